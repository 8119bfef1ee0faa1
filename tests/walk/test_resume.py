"""A stopped run continues bit by bit like an undisturbed one: after a signal, kill -9, or from a named checkpoint."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from atomtune.cli import main

STEPS = 40


def arguments(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        *("train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(out)),
        *("--dtype", "float32", "--lora_dropout", "0.1", "--per_device_train_batch_size", "4"),
        *("--gradient_accumulation_steps", "2", "--max_steps", str(STEPS), "--learning_rate", "5e-3"),
        *("--save_steps", "7", "--logging_steps", "1", *more),
    ]


def start(arguments: list[str], *, start_new_session: bool = False) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "atomtune", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=start_new_session,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(6000):  # on a busy machine, importing torch and transformers takes a minute
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> tuple[Path, Path, Path]:
    """(base, data, output folder) of an undisturbed run."""
    from tests.conftest import DIALOGUES, write_jsonl

    folder = tmp_path_factory.mktemp("whole")
    records = [{**record, "instruction": f"{record['instruction']} ({n})"} for n in range(5) for record in DIALOGUES]
    data = write_jsonl(folder / "dialogues.jsonl", records)
    assert main(arguments(models("llama"), data, folder / "out")) == 0
    return models("llama"), data, folder / "out"


def same_run(out: Path, whole: Path) -> None:
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (out, whole))
    assert ours["status"] == "finished"
    for key in ("loss_history", "tokens_computed", "tokens_padded", "steps", "records_used"):
        assert ours[key] == theirs[key], key


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "status"), [
    (signal.SIGTERM, 75, "preempted"),
    (signal.SIGINT, 75, "preempted"),
    (signal.SIGKILL, -signal.SIGKILL, "running"),
])  # fmt: skip
def test_a_stopped_run_resumes_bit_identically(whole, tmp_path, capsys, number, code, status):  # noqa: PLR0917
    base, data, undisturbed = whole
    out = tmp_path / "out"
    process = start(arguments(base, data, out))
    wait_for(out / "checkpoint-14" / "manifest.json", process)
    process.send_signal(number)
    said = process.communicate()[0]
    assert process.returncode == code, said
    assert json.loads((out / "run.json").read_text())["status"] == status
    if number != signal.SIGKILL:
        assert "--resume" in said
    assert main(arguments(base, data, out, "--resume")) == 0
    assert "Resuming from" in capsys.readouterr().out
    same_run(out, undisturbed)


@pytest.mark.slow
def test_incomplete_and_damaged_checkpoints_are_skipped_on_resume(whole, tmp_path, capsys):
    base, data, undisturbed = whole
    out = tmp_path / "out"
    process = start(arguments(base, data, out, "--save_total_limit", "8"))
    wait_for(out / "checkpoint-21" / "manifest.json", process)
    process.kill()
    process.communicate()
    for newer in out.glob("checkpoint-*"):
        if int(newer.name.partition("-")[2]) > 14:
            (newer / "manifest.json").unlink(missing_ok=True)
    weights = out / "checkpoint-14" / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-7])  # a truncated file and a complete manifest
    assert main(arguments(base, data, out, "--resume")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-21 is skipped" in said
    assert "checkpoint-14 is skipped: optimizer.pt has changed since it was written" in said
    assert "Resuming from" in said
    assert "checkpoint-7 at step 7" in said
    same_run(out, undisturbed)


@pytest.mark.parametrize("way", ["--resume_from_checkpoint", "--continue_training"])
def test_a_named_checkpoint_is_resumed_in_another_folder(whole, tmp_path, way):
    base, data, undisturbed = whole
    kept = sorted(undisturbed.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[0]
    flags = [way, str(kept)] if way == "--resume_from_checkpoint" else [way, "--checkpoint", str(kept)]
    out = tmp_path / "out"
    assert main(arguments(base, data, out, *flags)) == 0
    same_run(out, undisturbed)


@pytest.mark.parametrize(
    ("saves", "saved", "logged"),
    [
        (["--save_steps", "4"], "checkpoint-8", [1, 3, 4, 6, 8, 9, 10]),
        pytest.param(["--save_strategy", "epoch"], "checkpoint-5", [1, 3, 5, 6, 9, 10], marks=pytest.mark.slow),
        (
            [
                *("--save_strategy", "best", "--eval_size", "8", "--eval_strategy", "steps", "--eval_steps", "4"),
                *("--metric_for_best_model", "loss"),
            ],
            "checkpoint-4",
            [1, 3, 4, 6, 8, 9, 10],
        ),
    ],
    ids=["by steps", "by epoch", "the best"],
)
def test_losses_between_logs_are_not_lost_on_resume(models, dialogues, tmp_path, saves, saved, logged):  # noqa: PLR0917
    # The library divides a resumed run's loss by all steps, and drops losses not yet logged at the checkpoint.
    def run(out, *more):
        flags = ["--max_steps", "10", "--logging_steps", "3", *saves, *more]
        assert main([*arguments(models("llama"), dialogues, out), *flags]) == 0
        return json.loads((out / "run.json").read_text())

    whole = run(tmp_path / "whole")
    again = run(tmp_path / "again", "--resume_from_checkpoint", str(tmp_path / "whole" / saved))
    assert [entry["step"] for entry in whole["loss_history"]] == logged
    assert again["loss_history"] == whole["loss_history"]
    assert again["train_loss"] == whole["train_loss"]
    steps = [b["step"] - a["step"] for a, b in pairwise([{"step": 0}, *whole["loss_history"]])]
    losses = [entry["loss"] for entry in whole["loss_history"]]
    assert whole["train_loss"] == pytest.approx(sum(n * loss for n, loss in zip(steps, losses, strict=True)) / 10)


def test_a_run_killed_after_its_last_checkpoint_trains_no_further_steps(models, dialogues, tmp_path, capsys):
    out = tmp_path / "out"
    command = [*arguments(models("llama"), dialogues, out), "--max_steps", "7"]
    assert main(command) == 0
    adapter = (out / "adapter_model.safetensors").read_bytes()
    before = json.loads((out / "run.json").read_text())
    (out / "adapter_model.safetensors").unlink()
    (out / "run.json").write_text(json.dumps({**before, "status": "running"}))
    assert main([*command, "--resume"]) == 0
    assert "Nothing is left to train: all steps are done" in capsys.readouterr().out
    assert (out / "adapter_model.safetensors").read_bytes() == adapter
    after = json.loads((out / "run.json").read_text())
    for key in ("steps", "train_loss", "loss_history", "tokens_computed"):
        assert after[key] == before[key], key


@pytest.mark.parametrize(
    ("records", "batch", "length", "steps"),
    [
        (40, 4, ["--max_steps", "20"], 20),
        pytest.param(40, 4, ["--num_train_epochs", "2"], 20, marks=pytest.mark.slow),
        # Its end, 1 + 9 / 25 epochs, is less than 1.36 in Python.
        pytest.param(25, 1, ["--num_train_epochs", "1.36"], 34, marks=pytest.mark.slow),
    ],
    ids=["steps", "epochs", "a part of an epoch"],
)
def test_resuming_with_no_steps_left_is_reported_with_zero_training_time(  # noqa: PLR0917
    models, dialogues, tmp_path, capsys, records, batch, length, steps
):
    out, data = tmp_path / "out", tmp_path / "data.jsonl"
    data.write_text("".join(dialogues.read_text(encoding="utf-8").splitlines(keepends=True)[:records]), "utf-8")
    command = arguments(models("llama"), data, out, "--gradient_accumulation_steps", "1", "--save_steps", "5")
    at = command.index("--max_steps")
    command = [*command[:at], *command[at + 2 :], *length, "--per_device_train_batch_size", str(batch)]
    assert main(command) == 0
    before = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**before, "status": "running"}))
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "Nothing is left to train: all steps are done" in said
    assert f"Done: {steps} steps, all done before." in said
    assert "examples/s" not in said
    after = json.loads((out / "run.json").read_text())
    assert (before["seconds"] > 0, after["seconds"], after["examples_per_second"]) == (True, 0, 0)
    for key in ("steps", "train_loss", "loss_history", "tokens_computed"):
        assert after[key] == before[key], key


def test_a_refused_resume_leaves_run_json_unchanged(whole, tmp_path):
    base, data, undisturbed = whole
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    record = json.loads((out / "run.json").read_text()) | {"status": "preempted"}
    (out / "run.json").write_text(json.dumps(record))
    changed = tmp_path / data.name
    changed.write_text(data.read_text().replace("Good morning", "Good evening"), encoding="utf-8")
    assert main(arguments(base, changed, out, "--resume")) == 2
    assert json.loads((out / "run.json").read_text()) == record


@pytest.mark.parametrize("way", ["an older checkpoint", "weights alone"])
def test_continuing_from_an_older_checkpoint_in_the_same_folder_is_refused(whole, tmp_path, capsys, way):
    # Otherwise the newest checkpoint would be the other run's, and a later --resume would use it.
    base, data, undisturbed = whole
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    oldest = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[0]
    named = oldest if way == "an older checkpoint" else oldest / "adapter_model.safetensors"
    assert main(arguments(base, data, out, "--continue_training", "--checkpoint", str(named))) == 2
    assert "of an earlier run" in capsys.readouterr().err
    assert (out / "run.json").read_bytes() == (undisturbed / "run.json").read_bytes()


def test_lora_settings_ignored_for_a_loaded_adapter_are_reported(whole, tmp_path, capsys):
    base, data, undisturbed = whole
    flags = ["--continue_training", "--checkpoint", str(undisturbed / "adapter_model.safetensors")]
    flags += ["--lora_rank", "4", "--lora_dropout", "0", "--lora_targets", "q_proj,v_proj", "--use_dora"]
    assert main([*arguments(base, data, tmp_path / "out", *flags), "--max_steps", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--lora_rank 4 is not used: the checkpoint's adapter has 8" in said
    assert "--lora_dropout 0 is not used: the checkpoint's adapter has 0.1" in said
    assert "--lora_targets q_proj,v_proj is not used: the checkpoint's adapter has down_proj" in said
    assert "--use_dora true is not used: the checkpoint's adapter has none" in said and "rslora" not in said


def test_a_finished_run_is_left_alone(whole, capsys):
    base, data, out = whole
    before = (out / "run.json").read_bytes()
    assert main(arguments(base, data, out, "--resume")) == 0
    assert "already finished" in capsys.readouterr().out
    assert (out / "run.json").read_bytes() == before


def test_a_folder_that_holds_a_run_is_refused_without_resume(whole, capsys):
    base, data, out = whole
    assert main(arguments(base, data, out)) == 2
    assert "--resume" in capsys.readouterr().err


def test_resume_without_a_checkpoint_starts_over_and_reports_it(models, dialogues, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*arguments(models("llama"), dialogues, out, "--resume"), "--max_steps", "2"]) == 0
    assert "starting from the beginning" in capsys.readouterr().out


def test_resuming_with_changed_data_is_refused(whole, tmp_path, capsys):
    base, data, undisturbed = whole
    changed = tmp_path / data.name
    changed.write_text(data.read_text().replace("Good morning", "Good evening"), encoding="utf-8")
    kept = next(undisturbed.glob("checkpoint-*"))
    flags = ["--resume_from_checkpoint", str(kept)]
    assert main(arguments(base, changed, tmp_path / "out", *flags)) == 2
    assert "the data file (SHA-256)" in capsys.readouterr().err


def test_raising_max_steps_resumes_with_a_notice_about_the_schedule(models, dialogues, tmp_path, capsys):
    out = tmp_path / "out"
    command = arguments(models("llama"), dialogues, out)
    assert main([*command, "--max_steps", "4"]) == 0
    assert main([*command, "--max_steps", "8", "--resume"]) == 0
    assert "schedule is stretched" in " ".join(capsys.readouterr().out.split())
    record = json.loads((out / "run.json").read_text())
    assert record["steps"] == 8
    assert [entry["step"] for entry in record["loss_history"]] == list(range(1, 9))


def test_the_tutorials_checkpoint_format_is_loaded_as_weights_only(whole, tmp_path, capsys):
    """It has adapter_model.bin with `.default.` in its keys, and no config."""
    from safetensors.torch import load_file

    base, data, undisturbed = whole
    weights = load_file(undisturbed / "adapter_model.safetensors")
    old = {name.replace(".weight", ".default.weight"): tensor for name, tensor in weights.items()}
    folder = tmp_path / "checkpoint-40000"
    folder.mkdir()
    torch.save(old, folder / "adapter_model.bin")
    out = tmp_path / "out"
    flags = ["--continue_training", "--checkpoint", str(folder), "--learning_rate", "1e-12", "--lora_rank", "4"]
    assert main([*arguments(base, data, out, *flags), "--max_steps", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "weights only" in said
    assert "adapter_model.bin holds an adapter of rank 8. It is used instead of --lora_rank 4" in said
    after = load_file(out / "adapter_model.safetensors")
    assert after.keys() == weights.keys()
    assert all(torch.allclose(after[name], weights[name], atol=1e-9) for name in weights)


def test_a_missing_optimizer_is_reported_and_lora_settings_are_kept(models, dialogues, tmp_path, capsys):
    out = tmp_path / "out"
    command = arguments(models("llama"), dialogues, out, "--save_only_model")
    assert main([*command, "--max_steps", "2"]) == 0
    capsys.readouterr()
    more = [*command, "--max_steps", "3", "--resume", "--lora_rank", "4"]
    assert main(more) == 2
    assert "--lora_rank: 8 in checkpoint-2, 4 now" in capsys.readouterr().err
    assert main([*more, "--resume_anyway"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the optimizer starts from scratch" in said
    assert "--lora_rank 4 is not used: the checkpoint's adapter has 8" in said


@pytest.mark.parametrize(
    "schedule",
    [
        ("--lr_scheduler_type", "linear", "--warmup_steps", "4"),
        pytest.param(("--lr_scheduler_type", "cosine"), marks=pytest.mark.slow),
    ],
)
def test_resume_without_optimizer_continues_the_learning_rate_schedule(models, dialogues, tmp_path, schedule):
    # Once it rose again from 0 and ended at its highest value.
    command = arguments(models("llama"), dialogues, tmp_path / "whole", "--save_only_model", *schedule)
    command[command.index("--max_steps") + 1] = "12"
    command[command.index("--save_steps") + 1] = "8"
    assert main(command) == 0
    command[command.index("--output_dir") + 1] = str(tmp_path / "resumed")
    assert main([*command, "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-8")]) == 0
    rates, resumed_rates = (_rates(tmp_path / name / "checkpoint-12") for name in ("whole", "resumed"))
    assert len(rates) == 12 and len(set(rates[8:])) == 4
    assert resumed_rates[8:] == rates[8:]


@pytest.mark.parametrize(("optim", "starts_over"), [("sgd", True), ("adamw_torch", False)])
def test_another_optimizer_starts_from_scratch_on_resume(models, dialogues, tmp_path, capsys, optim, starts_over):  # noqa: PLR0917
    # Regression: it got the state of the first one, and its first step ended in a traceback.
    command = arguments(models("llama"), dialogues, tmp_path / "out")
    assert main([*command, "--optim", "adamw_torch_fused", "--max_steps", "2"]) == 0
    assert main([*command, "--optim", optim, "--max_steps", "4", "--resume", "--resume_anyway"]) == 0
    said = "the checkpoint holds the state of --optim adamw_torch_fused, so the optimizer starts from scratch."
    assert (said in " ".join(capsys.readouterr().out.split())) == starts_over
    state = torch.load(tmp_path / "out" / "checkpoint-4" / "optimizer.pt")["state"]
    assert starts_over or {entry["step"].item() for entry in state.values()} == {4.0}
    assert _rates(tmp_path / "out" / "checkpoint-4")[2:] == pytest.approx([5e-3 * 2 / 4, 5e-3 * 1 / 4])


def _rates(checkpoint: Path) -> list[float]:
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["learning_rate"] for entry in log if "learning_rate" in entry]


@pytest.mark.slow
def test_a_plateau_schedule_that_restarts_on_resume_is_reported(models, dialogues, tmp_path, capsys):
    plateau = ("--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_size", "4", "--eval_strategy", "steps")
    command = arguments(models("llama"), dialogues, tmp_path / "out", "--save_only_model", *plateau)
    command[command.index("--max_steps") + 1] = "2"
    assert main(command) == 0
    command[command.index("--max_steps") + 1] = "3"
    assert main([*command, "--resume"]) == 0
    assert "so the schedule starts from scratch" in " ".join(capsys.readouterr().out.split())


def test_a_plateau_schedule_that_keeps_its_rate_on_resume_is_reported(models, dialogues, tmp_path, capsys):
    # Regression: --resume_anyway promises the new values, and the old rate stayed without a word.
    plateau = ("--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_size", "4", "--eval_strategy", "steps")
    command = arguments(models("llama"), dialogues, tmp_path / "out", *plateau)
    assert main([*command, "--max_steps", "1"]) == 0
    assert main([*command, "--max_steps", "2", "--learning_rate", "1e-4", "--resume", "--resume_anyway"]) == 0
    kept = "so it goes on with the state in the checkpoint, at a learning rate of 0.005."
    assert kept in " ".join(capsys.readouterr().out.split())
    assert _rates(tmp_path / "out" / "checkpoint-2") == [5e-3, 5e-3]


@pytest.mark.parametrize(
    ("first", "then", "rates"),
    [("reduce_lr_on_plateau", "linear", [5e-3, 2.5e-3]), ("linear", "reduce_lr_on_plateau", [5e-3, 5e-3])],
)
def test_a_resumed_run_may_change_to_a_schedule_with_another_state(  # noqa: PLR0917  # pytest passes fixtures
    models, dialogues, tmp_path, capsys, first, then, rates
):
    # "holds a state that does not fit"; the other way round, the rate stayed at the 0 that a linear schedule ends with.
    evaluated = ("--eval_size", "4", "--eval_strategy", "steps", "--warmup_steps", "0")
    command = arguments(models("llama"), dialogues, tmp_path / "out", *evaluated)
    assert main([*command, "--max_steps", "1", "--lr_scheduler_type", first]) == 0
    changed = ("--max_steps", "2", "--lr_scheduler_type", then, "--resume", "--resume_anyway")
    assert main([*command, *changed]) == 0
    assert _rates(tmp_path / "out" / "checkpoint-2") == pytest.approx(rates)
    said = " ".join(capsys.readouterr().out.split())
    assert ("so the schedule starts from scratch" in said) == (then != "linear")


def test_a_run_started_from_weights_does_not_restart_without_them(whole, tmp_path, capsys):
    base, data, undisturbed = whole
    out = tmp_path / "out"
    out.mkdir()
    # As after a kill before the first checkpoint.
    (out / "run.json").write_text(json.dumps({"status": "running", "start": "weights"}))
    assert main(arguments(base, data, out, "--resume")) == 2
    assert "started from weights and has no complete checkpoint" in capsys.readouterr().err
    weights = str(undisturbed / "adapter_model.safetensors")
    assert main([*arguments(base, data, out, "--continue_training", "--checkpoint", weights), "--max_steps", "1"]) == 0
    # Regression: after a resume that had a checkpoint, the next one without any started over without the weights.
    resume = arguments(base, data, out, "--max_steps", "2", "--resume")
    assert main(resume) == 0
    shutil.rmtree(out / "checkpoint-1")
    shutil.rmtree(out / "checkpoint-2")
    (out / "adapter_model.safetensors").unlink()
    capsys.readouterr()
    assert main(resume) == 2
    assert "started from weights and has no complete checkpoint" in capsys.readouterr().err


def test_another_run_does_not_overwrite_a_finished_runs_adapter(models, whole, tmp_path, capsys):
    base, data, undisturbed = whole
    out = tmp_path / "out"
    assert main([*arguments(base, data, out, "--save_strategy", "no"), "--max_steps", "1"]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    elsewhere = next(undisturbed.glob("checkpoint-*"))
    for named in (elsewhere, elsewhere / "adapter_model.safetensors", out / "adapter_model.safetensors"):
        assert main(arguments(base, data, out, "--continue_training", "--checkpoint", str(named))) == 2
        assert "holds the adapter of a finished run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_resume_command_suggested_by_a_stopped_run_works(whole, tmp_path, capsys):
    base, data, undisturbed = whole
    out, kept = tmp_path / "out", next(undisturbed.glob("checkpoint-*"))
    flags = ["--resume_from_checkpoint", str(kept)]
    assert main(arguments(base, data, out, *flags, "--max_minutes", "0.0001")) == 75
    command = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("  "))
    words = shlex.split(command.partition(" train ")[2])
    assert words[-1] == "--resume" and "--resume_from_checkpoint" not in words and str(kept) not in words
    limit = words.index("--max_minutes")
    assert main(["train", *words[:limit], *words[limit + 2 :]]) == 0
    assert (out / "adapter_model.safetensors").read_bytes() == (undisturbed / "adapter_model.safetensors").read_bytes()


#: A checkpoint and an evaluation at every step. With greater_is_better the worst loss counts as the best, so that the
#: first step is the best one and the last is not.
WORST = [
    *("--eval_size", "8", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"),
    *("--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss", "--greater_is_better", "true"),
]


@pytest.fixture(scope="module")
def worst(models, tmp_path_factory) -> tuple[list[str], Path]:
    """The command without an output folder, and the folder, of a finished run whose best checkpoint is its first.

    The folder was moved afterwards, so the paths that the run has recorded lead nowhere.
    """
    from tests.conftest import numbered_dialogues, write_jsonl

    folder = tmp_path_factory.mktemp("worst")
    data = write_jsonl(folder / "dialogues.jsonl", numbered_dialogues())
    command = [*arguments(models("llama"), data, folder / "out", *WORST), "--max_steps", "6"]
    assert main([*command, "--save_total_limit", "9"]) == 0
    state = json.loads((folder / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / "out" / "checkpoint-1")
    at = command.index("--output_dir")
    return [*command[:at], *command[at + 2 :]], (folder / "out").rename(folder / "moved")


def killed_after(step: int, whole: Path, out: Path) -> None:
    """A copy of a run's folder as a kill after this step leaves it."""
    shutil.copytree(whole, out)
    for later in out.glob("checkpoint-*"):
        if int(later.name[11:]) > step:
            shutil.rmtree(later)
    (out / "adapter_model.safetensors").unlink()
    (out / "run.json").write_text(json.dumps({"status": "running"}))


def adapter_is_of(out: Path) -> list[str]:
    """The checkpoints whose adapter the run has saved."""
    adapter = (out / "adapter_model.safetensors").read_bytes()
    return [
        path.name for path in out.glob("checkpoint-*") if (path / "adapter_model.safetensors").read_bytes() == adapter
    ]


@pytest.mark.parametrize("step", [4, 6], ids=["steps left", "no step left"])
@pytest.mark.parametrize("fault", ["damaged", "gone"])
def test_a_resume_without_its_best_checkpoint_is_refused_before_it_trains(worst, tmp_path, capsys, fault, step):
    # Once the last step's adapter was saved, and called the best.
    (command, whole), out = worst, tmp_path / "out"
    killed_after(step, whole, out)
    if fault == "damaged":
        (out / "checkpoint-1" / "adapter_model.safetensors").write_bytes(b"torn")
    else:
        shutil.rmtree(out / "checkpoint-1")
    resume = [*command, "--output_dir", str(out), "--resume"]
    assert main(resume) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"The best checkpoint so far, {out / 'checkpoint-1'}, cannot be used" in said
    assert "--resume_anyway" in said and "--load_best_model_at_end false" in said
    assert json.loads((out / "run.json").read_text()) == {"status": "running"}
    assert not (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "kept"), [(["--resume_anyway"], 5), (["--load_best_model_at_end", "false"], 6)], ids=["anyway", "last"]
)
def test_a_run_that_goes_on_without_its_best_checkpoint_reports_what_it_keeps(worst, tmp_path, capsys, flags, kept):
    (command, whole), out = worst, tmp_path / "out"
    killed_after(4, whole, out)
    shutil.rmtree(out / "checkpoint-1")
    assert main([*command, "--output_dir", str(out), "--resume", *flags]) == 0
    assert adapter_is_of(out) == [f"checkpoint-{kept}"]
    record = json.loads((out / "run.json").read_text())
    losses = {entry["step"]: entry["loss"] for entry in record["eval_history"]}
    assert (record["outcome"]["kept_step"], record["eval_step"]) == (kept, kept)
    assert record["eval_loss"] == losses[kept]
    assert any("Only the evaluations still to come" in notice for notice in record["notices"]) == (kept == 5)


def test_a_run_that_goes_on_without_evaluations_says_which_step_its_held_out_loss_is_of(worst, tmp_path):
    # That of the last evaluation stood in run.json as if it were the loss of the adapter, two steps later.
    (command, whole), out = worst, tmp_path / "out"
    killed_after(4, whole, out)
    no_more = ["--load_best_model_at_end", "false", "--eval_strategy", "no"]
    assert main([*command, "--output_dir", str(out), "--resume", *no_more]) == 0
    record = json.loads((out / "run.json").read_text())
    losses = {entry["step"]: entry["loss"] for entry in record["eval_history"]}
    assert record["outcome"]["kept_step"] == 6 and max(losses) == record["eval_step"] == 4
    assert record["eval_loss"] == losses[4]


def test_a_run_without_its_best_checkpoint_and_without_steps_left_keeps_the_last(worst, tmp_path):
    (command, whole), out = worst, tmp_path / "out"
    killed_after(6, whole, out)
    shutil.rmtree(out / "checkpoint-1")
    assert main([*command, "--output_dir", str(out), "--resume", "--resume_anyway"]) == 0
    assert adapter_is_of(out) == ["checkpoint-6"]
    assert json.loads((out / "run.json").read_text())["outcome"]["kept_step"] == 6


@pytest.mark.parametrize("way", ["no step left", "steps left", "another folder"])
def test_the_best_checkpoint_is_found_after_a_move(worst, tmp_path, way):
    (command, whole), moved, out = worst, tmp_path / "moved", tmp_path / "out"
    killed_after(6 if way == "no step left" else 4, whole, moved)
    flags = ["--output_dir", str(out), "--resume_from_checkpoint", str(moved / "checkpoint-4")]
    if way != "another folder":
        out, flags = moved, ["--output_dir", str(moved), "--resume"]
    assert main([*command, *flags, "--save_total_limit", "1"]) == 0
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert json.loads((out / "run.json").read_text())["outcome"]["kept_step"] == 1
    assert (moved / "checkpoint-1").is_dir()


def test_the_best_checkpoint_is_loaded_in_full_even_if_peft_leaves_tensors_out(worst, tmp_path, monkeypatch):
    # It leaves out tensors whose names it changes; here it leaves out all, and the last step's would be saved.
    (command, whole), out = worst, tmp_path / "out"
    killed_after(6, whole, out)
    monkeypatch.setattr(Trainer, "_load_best_model", lambda trainer: None)
    assert main([*command, "--output_dir", str(out), "--resume"]) == 0
    assert adapter_is_of(out) == ["checkpoint-1"]


def damaged_after_training(monkeypatch, checkpoint: Path) -> None:
    """Damage a checkpoint of the next run after its last step."""
    from atomtune.train import trainer

    real = trainer.LoraTrainer._finalize_training

    def torn(self, *args):
        (checkpoint / "adapter_model.safetensors").write_bytes(b"torn")
        return real(self, *args)

    monkeypatch.setattr(trainer.LoraTrainer, "_finalize_training", torn)


@pytest.mark.slow
def test_a_best_checkpoint_that_is_damaged_during_the_run_fails_it(worst, tmp_path, monkeypatch, capsys):
    (command, _), out = worst, tmp_path / "out"
    damaged_after_training(monkeypatch, out / "checkpoint-1")
    assert main([*command, "--output_dir", str(out)]) == 3
    assert f"The best checkpoint, {out / 'checkpoint-1'}, cannot be used" in capsys.readouterr().err
    assert not (out / "adapter_model.safetensors").exists()
    monkeypatch.undo()
    assert main([*command, "--output_dir", str(out), "--resume", "--load_best_model_at_end", "false"]) == 0
    assert adapter_is_of(out) == ["checkpoint-6"]


def stopped_in_step(monkeypatch, step: int) -> None:
    """Send SIGTERM to this process in a step of the next run; each step has two micro-batches."""
    from atomtune.train import trainer

    real, calls = trainer.target_nats, []

    def target_nats(model, *args, **kwargs):
        calls.append(model.training)
        if sum(calls) == 2 * step and model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, *args, **kwargs)

    monkeypatch.setattr(trainer, "target_nats", target_nats)


def test_a_stop_keeps_its_checkpoint_beside_the_best_with_a_limit_of_one(worst, tmp_path, monkeypatch, capsys):
    # The Trainer removes every checkpoint but the best at the end of training, and a stop is one too.
    (command, whole), out = worst, tmp_path / "out"
    foreign = out / "checkpoint-3.other-1"
    foreign.mkdir(parents=True)
    one = [*command, "--output_dir", str(out), "--save_total_limit", "1"]
    with monkeypatch.context() as patch:
        stopped_in_step(patch, 3)
        assert main(one) == 75
    assert "stopped after step 3 with a checkpoint" in capsys.readouterr().err
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3", foreign.name}
    assert main([*one, "--resume"]) == 0
    assert "at step 3" in " ".join(capsys.readouterr().out.split())
    assert {path.name for path in out.glob("checkpoint-*")} == {
        *("checkpoint-1", "checkpoint-3", "checkpoint-6"),  # the best, the one resumed from, the last
        foreign.name,
    }
    same_run(out, whole)


def test_a_stop_does_not_load_the_best_checkpoint(worst, tmp_path, monkeypatch, capsys):
    # Once a damaged one made a stop a failure, though the run's own checkpoint was complete.
    (command, _), out = worst, tmp_path / "out"
    damaged_after_training(monkeypatch, out / "checkpoint-1")
    stopped_in_step(monkeypatch, 3)
    assert main([*command, "--output_dir", str(out)]) == 75
    assert "stopped after step 3 with a checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_only_a_step_with_a_checkpoint_is_kept_as_the_best(worst, tmp_path, monkeypatch):
    # Once an evaluation between two checkpoints was reported as the one that is kept.
    (command, _), whole, out = worst, tmp_path / "whole", tmp_path / "out"
    command = [*command, "--save_steps", "2", "--save_total_limit", "9"]
    assert main([*command, "--output_dir", str(whole)]) == 0
    record = json.loads((whole / "run.json").read_text())
    assert adapter_is_of(whole) == ["checkpoint-2"] and record["outcome"]["kept_step"] == 2
    # A stop saves a step between two, which is not kept either.
    with monkeypatch.context() as patch:
        stopped_in_step(patch, 1)
        assert main([*command, "--output_dir", str(out)]) == 75
    assert main([*command, "--output_dir", str(out), "--resume"]) == 0
    same_run(out, whole)


@pytest.mark.slow
def test_the_best_is_compared_by_the_present_metric(models, dialogues, tmp_path, monkeypatch):
    # Once a resumed run compared perplexities with the best loss, so that no later step was better.
    flags = ["--eval_size", "8", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    command = arguments(models("llama"), dialogues, tmp_path / "out", *flags, "--max_steps", "6")
    with monkeypatch.context() as patch:
        stopped_in_step(patch, 2)
        assert main(command) == 75
    assert main([*command, "--metric_for_best_model", "perplexity", "--resume"]) == 0
    outcome = json.loads((tmp_path / "out" / "run.json").read_text())["outcome"]
    assert outcome["best_step"] == outcome["kept_step"] > 2


@pytest.mark.slow
def test_counts_go_on_with_restored_callback_states(models, dialogues, tmp_path, monkeypatch):
    # With that flag the library replaces callbacks, and the counts of the steps after a resume were lost.
    flags = ["--max_steps", "6", "--restore_callback_states_from_checkpoint", "true"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(arguments(models("llama"), dialogues, whole, *flags)) == 0
    with monkeypatch.context() as patch:
        stopped_in_step(patch, 2)
        assert main(arguments(models("llama"), dialogues, out, *flags)) == 75
    assert main(arguments(models("llama"), dialogues, out, *flags, "--resume")) == 0
    same_run(out, whole)


def test_a_stop_saves_its_step_even_if_it_is_not_the_best(models, dialogues, tmp_path, monkeypatch, capsys):
    # A schedule that follows the losses needs every evaluation, so a stop does not interrupt it.
    flags = [
        *("--eval_size", "8", "--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "best"),
        *("--lr_scheduler_type", "reduce_lr_on_plateau", "--metric_for_best_model", "loss"),
        *("--greater_is_better", "true"),  # so the first step is the best
    ]
    command = arguments(models("llama"), dialogues, tmp_path / "out", *flags, "--max_steps", "6")
    stopped_in_step(monkeypatch, 3)
    assert main(command) == 75
    assert "stopped after step 3 with a checkpoint" in capsys.readouterr().err
    assert (tmp_path / "out" / "checkpoint-3").is_dir()


def test_fewer_steps_than_the_checkpoint_has_end_the_run_without_mentioning_patience(worst, tmp_path, capsys):
    (command, whole), out = worst, tmp_path / "out"
    killed_after(4, whole, out)
    assert main([*command, "--max_steps", "3", "--output_dir", str(out), "--resume"]) == 0
    said = capsys.readouterr().out
    assert "Done: 4 steps, all done before." in said
    assert "Ended before" not in said


@pytest.mark.slow
def test_the_end_by_patience_is_reported_with_the_present_length(worst, tmp_path, capsys):
    (command, _), out = worst, tmp_path / "out"
    early = [*command, "--output_dir", str(out), "--learning_rate", "1e-12", "--early_stopping_patience", "1"]
    assert main(early) == 0
    steps = json.loads((out / "run.json").read_text())["steps"]
    assert steps < 6
    (out / "adapter_model.safetensors").unlink()
    (out / "run.json").write_text(json.dumps({"status": "running"}))
    capsys.readouterr()
    assert main([*early, "--max_steps", "9", "--resume"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"Done: {steps} steps, all done before. Ended before step 9: --early_stopping_patience 1." in said
    assert "Nothing is left to train: --early_stopping_patience 1 has ended the run." in said


def test_the_end_by_patience_is_reported_in_chinese(worst, tmp_path, capsys):
    # Regression: "完成：3 步 in 2 s, 3.1 examples/s. Ended before step 6: …".
    (command, _), out = worst, tmp_path / "out"
    early = [*command, "--output_dir", str(out), "--learning_rate", "1e-12", "--early_stopping_patience", "1"]
    assert main([*early, "--language", "zh"]) == 0
    done, ended = re.findall("完成：.*|没有到第.*", capsys.readouterr().out)
    assert re.fullmatch(r"完成：\d+ 步，用时 [\d 分秒]+，每秒 [\d.]+ 个样本。", done)
    assert ended == "没有到第 6 步就结束了：--early_stopping_patience 1。"


def test_changed_library_versions_are_reported(whole, tmp_path, capsys, monkeypatch):
    base, data, undisturbed = whole
    kept = next(undisturbed.glob("checkpoint-*"))
    from atomtune.train import run_report

    monkeypatch.setattr(run_report, "version", lambda name: "99.0")
    flags = ["--resume_from_checkpoint", str(kept), "--max_minutes", "0.0001"]
    assert main(arguments(base, data, tmp_path / "out", *flags)) == 75
    assert "versions changed since the run began" in " ".join(capsys.readouterr().out.split())


TORN = ["{", "[]", "{}", "null", '{"r": 8}', ""]


@pytest.mark.parametrize("content", TORN)
@pytest.mark.parametrize("name", ["atomtune.json", "adapter_config.json"])
def test_a_corrupt_config_file_beside_the_weights_is_named(whole, tmp_path, capsys, name, content):
    base, data, undisturbed = whole
    for source, use in (
        (undisturbed, ["chat", "--prompt", "x", "--adapter_path"]),
        (undisturbed, ["merge", "--output_dir", str(tmp_path / "merged"), "--adapter_path"]),
        (next(undisturbed.glob("checkpoint-*")), arguments(base, data, tmp_path / "out", "--resume_from_checkpoint")),
    ):
        folder = tmp_path / use[0]
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
        (folder / "manifest.json").unlink(missing_ok=True)
        (folder / name).write_text(content)
        assert main([*use, str(folder)]) == 2, use
        told = capsys.readouterr().err
        assert str(folder / name) in told
        assert "Traceback" not in told


@pytest.mark.parametrize("content", ["{", "[]", "{}", "null"])
def test_a_corrupt_trainer_state_of_another_tools_checkpoint_is_named(whole, tmp_path, capsys, content):
    base, data, undisturbed = whole
    folder = tmp_path / "checkpoint-7"
    shutil.copytree(next(undisturbed.glob("checkpoint-*")), folder)
    (folder / "manifest.json").unlink()
    (folder / "trainer_state.json").write_text(content)
    assert main(arguments(base, data, tmp_path / "out", "--resume_from_checkpoint", str(folder))) == 2
    told = capsys.readouterr().err
    assert "trainer_state.json c" in told, "cannot be read, or cannot be used"
    assert "--continue_training" in told


def test_an_invalid_run_json_is_treated_as_missing(models, dialogues, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("[1]")
    assert main([*arguments(models("llama"), dialogues, out), "--max_steps", "1"]) == 0
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_the_whole_process_group_is_handled_as_one_stop(whole, tmp_path, number):
    # Clusters and terminals also signal the data workers, and a worker that dies is an error of the run.
    base, data, undisturbed = whole
    out, flags = tmp_path / "out", ["--dataloader_num_workers", "2"]
    process = start(arguments(base, data, out, *flags), start_new_session=True)
    wait_for(out / "checkpoint-7" / "manifest.json", process)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 75, said
    assert "with a checkpoint" in said
    assert main(arguments(base, data, out, "--resume")) == 0  # without workers, because they start anew in each epoch
    assert (out / "adapter_model.safetensors").read_bytes() == (undisturbed / "adapter_model.safetensors").read_bytes()
