"""A resumed run equals the undisturbed run: from every step, for every way through the data, after any kind of stop.

On a CPU with one thread, the adapter's bytes and every logged loss must be equal.
"""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atomtune.cli import main
from atomtune.model.fingerprint import fingerprint
from atomtune.train import trainer as trainer_module
from atomtune.train.callbacks import SAME_REQUEST_SECONDS
from atomtune.train.checkpoint.atomic import checkpoints
from tests.trained import whole_run

EVERY = bool(os.environ.get("ATOMTUNE_SOAK"))

#: 40 records in batches of 3 make 14 batches per epoch, the last one with a single record.
WAYS = {
    "epochs": ["--num_train_epochs", "2"],
    "ragged accumulation": ["--num_train_epochs", "2", "--gradient_accumulation_steps", "4"],
    "by length": ["--num_train_epochs", "2", "--train_sampling_strategy", "group_by_length"],
    "rebalanced": ["--num_train_epochs", "2", "--train_sampling_strategy", "batch_rebalance"],
    "evaluated": ["--max_steps", "16", "--eval_size", "7", "--eval_strategy", "steps", "--eval_steps", "3"],
    "tree": ["--max_steps", "16", "--layout", "tree", "--lr_scheduler_type", "cosine", "--warmup_steps", "3"],
    "padded": ["--max_steps", "16", "--layout", "padded", "--gradient_checkpointing", "true"],
    "workers": ["--max_steps", "16", "--dataloader_num_workers", "2"],
    "dora": ["--max_steps", "16", "--use_dora", "true"],
    "other optimizer": ["--max_steps", "16", "--optim", "adafactor", "--weight_decay", "0.1"],
    "best": [
        *("--max_steps", "16", "--eval_size", "7", "--eval_strategy", "steps", "--eval_steps", "2"),
        *("--load_best_model_at_end", "true", "--metric_for_best_model", "loss"),
    ],
}


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        *("train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(out)),
        *("--dtype", "float32", "--lora_dropout", "0.1", "--per_device_train_batch_size", "3"),
        *("--learning_rate", "5e-3", "--logging_steps", "1", "--save_steps", "1", "--save_total_limit", "100", *more),
    ]


def record(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def same_run(out: Path, whole: Path) -> None:
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    ours, theirs = record(out), record(whole)
    assert ours["status"] == "finished"
    for key in ("loss_history", "train_loss", "eval_loss", "tokens_computed", "tokens_padded", "steps"):
        assert ours.get(key) == theirs.get(key), key


SLOW = (
    "epochs",
    "evaluated",
    "ragged accumulation",
    "by length",
    "workers",
    "padded",
    "rebalanced",
    "other optimizer",
    "dora",
    "best",
)


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow) if way in SLOW else way for way in WAYS])
def test_resuming_from_every_step_gives_the_same_run(models, dialogues, tmp_path, way):
    base, whole = models("llama"), tmp_path / "whole"
    flags = [*WAYS[way], *(["--save_steps", "2"] if way == "best" else [])]
    assert main(command(base, dialogues, whole, *flags)) == 0
    found = sorted(checkpoints(whole), key=lambda path: int(path.name[11:]))
    assert len(found) > 6
    if way == "best":
        best = json.loads((found[-1] / "trainer_state.json").read_text())["best_model_checkpoint"]
        assert Path(best) in found, "named by the path it ends under"
    # To save time, half of the ways resume from the first and the last but one, the others from the middle.
    few = (found[0], found[-2]) if list(WAYS).index(way) % 2 else (found[len(found) // 2],)
    for kept in found if EVERY else few:
        out = tmp_path / f"from-{kept.name}"
        if way == "best":  # the best so far is stored by its path
            shutil.copytree(whole, out)
            for later in found[found.index(kept) + 1 :]:
                shutil.rmtree(out / later.name)
            (out / "run.json").write_text(json.dumps({"status": "running"}))
            assert main(command(base, dialogues, out, *flags, "--resume")) == 0
        else:
            assert main(command(base, dialogues, out, *flags, "--resume_from_checkpoint", str(kept))) == 0
        same_run(out, whole)


def signalled(out: Path, number: int, step: int) -> threading.Thread:
    """A thread that sends this process a signal as soon as a checkpoint exists."""

    def send() -> None:
        for _ in range(2000):
            if (out / f"checkpoint-{step}" / "manifest.json").exists():
                os.kill(os.getpid(), number)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


LONG = ["--max_steps", "30", "--eval_size", "7", "--eval_strategy", "steps", "--eval_steps", "4"]


@pytest.fixture(scope="module")
def long_run(models, tmp_path_factory) -> tuple[Path, Path]:
    """A file of the dialogues, and the folder of the undisturbed run with LONG on it."""
    folder = tmp_path_factory.mktemp("long")
    return whole_run(folder, lambda data, out: command(models("llama"), data, out, *LONG))


OTHERS = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)]


@pytest.mark.parametrize("number", [signal.SIGTERM, *OTHERS], ids=lambda number: number.name)
def test_a_run_stopped_by_any_stop_signal_resumes_to_the_same_result(models, long_run, tmp_path, capsys, number):
    base, out = models("llama"), tmp_path / "out"
    data, whole = long_run
    before = signal.getsignal(number)
    thread = signalled(out, number, 9)
    code = main(command(base, data, out, *LONG))
    thread.join()
    assert signal.getsignal(number) == before
    assert code == 75
    assert f"{number.name} received; stopped after step" in capsys.readouterr().err
    stopped = record(out)
    assert stopped["status"] == "preempted"
    assert 9 <= stopped["steps"] < 30
    assert not (out / "adapter_model.safetensors").exists(), "an unfinished run leaves no final adapter"
    assert main(command(base, data, out, *LONG, "--resume")) == 0
    same_run(out, whole)


@pytest.mark.slow
def test_a_run_stopped_three_times_gives_the_same_result(models, dialogues, tmp_path):
    base, whole, out = models("llama"), tmp_path / "whole", tmp_path / "out"
    flags = ["--max_steps", "30", "--gradient_accumulation_steps", "3"]
    assert main(command(base, dialogues, whole, *flags)) == 0
    for number, step in enumerate((5, 12, 20)):
        thread = signalled(out, signal.SIGTERM, step)
        assert main(command(base, dialogues, out, *flags, *(["--resume"] if number else []))) == 75
        thread.join()
    assert main(command(base, dialogues, out, *flags, "--resume")) == 0
    same_run(out, whole)


@pytest.mark.slow
def test_an_evaluation_interrupted_by_a_stop_is_repeated_on_resume(models, dialogues, tmp_path, monkeypatch):
    base, whole, out = models("llama"), tmp_path / "whole", tmp_path / "out"
    flags = ["--max_steps", "6", "--eval_size", "20", "--eval_strategy", "steps", "--eval_steps", "3"]
    flags += ["--per_device_eval_batch_size", "2"]
    assert main(command(base, dialogues, whole, *flags)) == 0
    real, seen = trainer_module.target_nats, []

    def interrupted(model, batch, **kwargs):
        if not model.training:
            seen.append(1)
            if len(seen) == 14:  # the fourth of ten batches of the second evaluation, after the last step
                os.kill(os.getpid(), signal.SIGTERM)
        return real(model, batch, **kwargs)

    monkeypatch.setattr(trainer_module, "target_nats", interrupted)
    assert main(command(base, dialogues, out, *flags)) == 75
    assert len(seen) == 14
    monkeypatch.undo()
    assert main(command(base, dialogues, out, *flags, "--resume")) == 0
    same_run(out, whole)


@pytest.mark.slow
def test_reaching_max_minutes_stops_the_run_resumably(models, dialogues, tmp_path, capsys):
    base, whole, out = models("llama"), tmp_path / "whole", tmp_path / "out"
    flags = ["--max_steps", "5"]
    assert main(command(base, dialogues, whole, *flags)) == 0
    assert main(command(base, dialogues, out, *flags, "--max_minutes", "0.0001")) == 75
    assert "the time limit is reached (--max_minutes 0.0001); stopped after step 1" in capsys.readouterr().err
    assert main(command(base, dialogues, out, *flags, "--resume")) == 0
    same_run(out, whole)


def test_resume_with_only_the_output_folder_reuses_the_runs_settings(models, dialogues, tmp_path, capsys):
    base, whole, out = models("llama"), tmp_path / "whole", tmp_path / "out"
    flags = ["--max_steps", "5", "--lr", "2e-3", "--lora_targets", "q_proj", "v_proj", "--weight_decay", "0.1"]
    assert main(command(base, dialogues, whole, *flags)) == 0
    assert main(command(base, dialogues, out, *flags, "--max_minutes", "0.0001")) == 75
    resumed = ["train", "--resume", "--output_dir", str(out), "--max_minutes", "0"]
    assert main(resumed) == 0
    assert f"is taken from the run that it resumes ({out / 'run.json'})" in capsys.readouterr().err
    same_run(out, whole)
    assert main(resumed) == 0
    assert "already finished" in capsys.readouterr().out


def test_a_signal_before_the_first_step_reports_that_nothing_is_saved(models, dialogues, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def while_loading(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    from atomtune.train import model

    monkeypatch.setattr(model, "load_base", while_loading)
    assert main(command(models("llama"), dialogues, out, "--max_steps", "2")) == 75
    said = capsys.readouterr().err
    assert "SIGTERM received; stopped at once. There is no checkpoint yet" in said
    assert record(out)["status"] == "preempted"
    monkeypatch.undo()
    assert main(command(models("llama"), dialogues, out, "--max_steps", "2", "--resume")) == 0


def stopped_twice(monkeypatch, *, seconds_apart: float) -> None:
    """Send SIGTERM twice to this process in the third step of the next run."""
    real, steps = trainer_module.target_nats, []

    def target_nats(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(seconds_apart)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer_module, "target_nats", target_nats)


def test_a_second_signal_exits_at_once_and_names_the_last_checkpoint(models, dialogues, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    stopped_twice(monkeypatch, seconds_apart=SAME_REQUEST_SECONDS + 0.1)
    assert main(command(models("llama"), dialogues, out, "--max_steps", "9", "--layout", "padded")) == 75
    said = capsys.readouterr().err
    assert "stopped at once. The last complete checkpoint is" in said
    assert "checkpoint-2" in said
    assert record(out)["status"] == "preempted"


def test_a_signal_that_a_launcher_passes_on_again_is_one_request(models, dialogues, tmp_path, monkeypatch, capsys):
    # A cluster signals torchrun and its processes, and torchrun passes its signal on: each process gets it twice.
    out = tmp_path / "out"
    stopped_twice(monkeypatch, seconds_apart=0.1)
    assert main(command(models("llama"), dialogues, out, "--max_steps", "9", "--layout", "padded")) == 75
    assert "SIGTERM received; stopped after step 3 with a checkpoint" in capsys.readouterr().err
    assert checkpoints(out)[0].name == "checkpoint-3"


def test_a_run_under_nohup_ignores_sighup(models, dialogues, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        thread = signalled(tmp_path / "out", signal.SIGHUP, 2)
        assert main(command(models("llama"), dialogues, tmp_path / "out", "--max_steps", "5")) == 0
        thread.join()
    finally:
        signal.signal(signal.SIGHUP, before)


# --- what a resumed run may not change ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    return whole_run(folder, lambda data, out: command(models("llama"), data, out, "--max_steps", "2"))[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed", "7"], "--seed: 42 in checkpoint-2, 7 now"),
        (["--per_device_train_batch_size", "2"], "--per_device_train_batch_size: 3 in checkpoint-2, 2 now"),
        (["--learning_rate", "1e-3"], "--learning_rate: 0.005 in checkpoint-2, 0.001 now"),
        (["--lora_rank", "4"], "--lora_rank: 8 in checkpoint-2, 4 now"),
        (["--weight_decay", "0.1"], "--weight_decay: 0.0 in checkpoint-2, 0.1 now"),
        (["--lora_targets", "q_proj,v_proj"], "--lora_targets: all-linear in checkpoint-2, q_proj,v_proj now"),
    ],
)
def test_a_changed_setting_is_refused_by_name(  # noqa: PLR0917  # pytest's fixtures
    models, dialogues, two_steps, tmp_path, capsys, flags, said
):
    out = Path(shutil.copytree(two_steps, tmp_path / "out"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(command(models("llama"), dialogues, out, "--max_steps", "4", *flags, "--resume")) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "--resume_anyway" in told
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_resuming_with_changed_template_tokenizer_or_data_is_refused(models, dialogues, two_steps, tmp_path, capsys):
    out = Path(shutil.copytree(two_steps, tmp_path / "out"))
    template = tmp_path / "other.jinja"
    source = (out / "chat_template.jinja").read_text()
    template.write_text(source + "{# another #}")
    other = tmp_path / "base"
    shutil.copytree(models("llama"), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["lstrip"] = not tokenizer["added_tokens"][0]["lstrip"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    dialogues.write_text(dialogues.read_text() + '{"instruction": "new", "output": "record"}\n')
    flags = ["--max_steps", "4", "--resume", "--template", str(template)]
    assert main(command(other, dialogues, out, *flags)) == 2
    said = capsys.readouterr().err
    for name in ("the data file", "the template", "the tokenizer"):
        assert f"{name} (SHA-256): " in said


def test_resuming_with_a_changed_base_config_is_refused(models, dialogues, tmp_path, capsys):
    # The weights and their fingerprint are the same, but another config computes something else with them.
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(models("llama"), base)
    assert main(command(base, dialogues, out, "--max_steps", "2")) == 0
    config = json.loads((base / "config.json").read_text())
    saved_elsewhere = {**config, "_name_or_path": "elsewhere", "transformers_version": "6.1"}
    (base / "config.json").write_text(json.dumps(saved_elsewhere))
    assert main(command(base, dialogues, out, "--max_steps", "3", "--resume")) == 0
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert main(command(base, dialogues, out, "--max_steps", "4", "--resume")) == 2
    assert "the base's config.json (SHA-256): " in capsys.readouterr().err


@pytest.mark.slow
def test_resuming_with_one_changed_row_of_base_weights_is_refused(models, dialogues, tmp_path, capsys):
    # The fingerprint covers the first and the middle row of a weight; this row is neither.
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(models("llama"), base)
    assert main(command(base, dialogues, out, "--max_steps", "2")) == 0
    weights = load_file(base / "model.safetensors")
    original = (base / "model.safetensors").read_bytes()
    name = next(name for name in weights if "embed_tokens" in name)
    weights[name][7] += 1
    before = fingerprint(str(base))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(str(base)) == before
    assert main(command(base, dialogues, out, "--max_steps", "4", "--resume")) == 2
    assert "the base's weights (checksum): " in capsys.readouterr().err
    (base / "model.safetensors").write_bytes(original)  # a copy is the same base, whenever it was written
    assert main(command(base, dialogues, out, "--max_steps", "4", "--resume")) == 0


def test_resuming_with_a_changed_evaluation_file_is_refused(models, dialogues, tmp_path, capsys):
    # If the best checkpoint is kept, the evaluation file decides the final weights.
    out, held = tmp_path / "out", tmp_path / "held.jsonl"
    held.write_text('{"instruction": "Hi", "output": "Hello"}\n')
    flags = ["--eval_path", str(held), "--resume"]
    assert main(command(models("llama"), dialogues, out, "--max_steps", "2", *flags)) == 0
    held.write_text('{"instruction": "Hi", "output": "Hullo"}\n')
    assert main(command(models("llama"), dialogues, out, "--max_steps", "4", *flags)) == 2
    assert "the evaluation file (SHA-256): " in capsys.readouterr().err


def test_resume_anyway_applies_the_new_settings(models, dialogues, two_steps, tmp_path, capsys):
    out = Path(shutil.copytree(two_steps, tmp_path / "out"))
    flags = ["--max_steps", "4", "--learning_rate", "1e-3", "--weight_decay", "0.5", "--resume", "--resume_anyway"]
    assert main(command(models("llama"), dialogues, out, *flags)) == 0
    assert "this is no longer the run that was started (--resume_anyway). Changed: " in " ".join(
        capsys.readouterr().out.split()
    )
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["learning_rate"] == pytest.approx(1e-3 * 2 / 4)
    optimizer = torch.load(out / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.5, 0.0}, "0 for what has one dimension"


@pytest.mark.slow
def test_settings_that_may_change_on_resume_take_effect(models, dialogues, tmp_path):
    base, whole, out = models("llama"), tmp_path / "whole", tmp_path / "out"
    assert main(command(base, dialogues, whole, "--max_steps", "8")) == 0
    flags = ["--max_steps", "8", "--save_steps", "3", "--logging_steps", "4", "--per_device_eval_batch_size", "2"]
    kept = whole / "checkpoint-2"
    assert main(command(base, dialogues, out, *flags, "--resume_from_checkpoint", str(kept))) == 0
    assert sorted(path.name for path in checkpoints(out)) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_with_any_one_damaged_file_is_skipped(models, dialogues, tmp_path, capsys):
    base, whole = models("llama"), tmp_path / "whole"
    assert main(command(base, dialogues, whole, "--max_steps", "4", "--save_steps", "2")) == 0
    files = sorted(path.relative_to(whole) for path in (whole / "checkpoint-4").iterdir())
    assert len(files) > 10
    for number, name in enumerate(files):
        out = tmp_path / f"out-{number}"
        shutil.copytree(whole, out)
        (out / "run.json").write_text(json.dumps({**record(whole), "status": "running"}))
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 4
        (out / name).write_bytes(content)
        assert main(command(base, dialogues, out, "--max_steps", "4", "--save_steps", "2", "--resume")) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "checkpoint-4 is skipped" in said, name
        assert "Resuming from" in said
        same_run(out, whole)
