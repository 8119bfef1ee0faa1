"""Each failure gives one message with place, cause and remedy and the right exit code, and loses nothing."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atomtune.cli import main
from atomtune.model import load_errors
from atomtune.train import trainer


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(out), *more]


def status(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def test_train_with_only_a_model_or_only_data_names_the_missing_flag(models, dialogues, capsys):
    assert main(["train", "--model_path", str(models("llama"))]) == 2
    assert "--dataset_path" in capsys.readouterr().err
    assert main(["train", "--dataset_path", str(dialogues)]) == 2
    assert "--model_path" in capsys.readouterr().err


def test_broken_records_are_named_and_skip_bad_trains_on_the_others(models, dialogues, tmp_path, capsys):
    with dialogues.open("a", encoding="utf-8") as file:
        file.write('{"instruction": "no output"}\nnot json\n')
    out = tmp_path / "out"
    assert main(command(models("llama"), dialogues, out, "--max_steps", "1")) == 2
    said = capsys.readouterr().err
    assert 'dialogues.jsonl:41  no key "output"; keys here: instruction' in said
    assert "dialogues.jsonl:42  not JSON" in said
    assert "2 of 42 records refused" in said
    assert "--skip_bad trains on the other 40" in said

    assert main(command(models("llama"), dialogues, tmp_path / "two", "--max_steps", "1", "--skip_bad")) == 0
    record = status(tmp_path / "two")
    assert (record["records_read"], record["records_used"]) == (42, 40)
    assert [entry["origin"] for entry in record["records_refused"]] == ["dialogues.jsonl:41", "dialogues.jsonl:42"]


def test_an_adapter_that_learned_nothing_is_not_saved(models, dialogues, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(models("llama"), dialogues, out, "--max_steps", "1", "--learning_rate", "0")) == 3
    assert "empty" in capsys.readouterr().err
    assert not (out / "adapter_model.safetensors").exists()


def test_two_runs_do_not_share_a_folder(models, dialogues, tmp_path, capsys):
    from filelock import FileLock

    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        assert main(command(models("llama"), dialogues, out, "--max_steps", "1")) == 2
    assert "another run" in capsys.readouterr().err


def test_an_out_of_memory_error_suggests_settings_to_change(models, dialogues, tmp_path, monkeypatch, capsys):
    """A real allocation that this machine cannot make, in the middle of a step."""

    def greedy(*args, **kwargs):
        return torch.empty(1 << 50, dtype=torch.uint8).sum(), None

    monkeypatch.setattr(trainer, "target_nats", greedy)
    flags = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2"]
    assert main(command(models("llama"), dialogues, tmp_path / "out", *flags)) == 3
    said = capsys.readouterr().err
    order = [said.index(flag) for flag in ("--gradient_checkpointing", "--per_device_train_batch_size 4", "--quantize")]
    assert order == sorted(order), "the least loss first"
    assert "--gradient_accumulation_steps 4" in said
    assert "B at batch" in said
    assert status(tmp_path / "out")["status"] == "failed"


def test_an_example_longer_than_the_models_positions_is_refused(models, tmp_path, capsys):
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"instruction": "长" * 900, "input": "", "output": "短"}) + "\n", encoding="utf-8")
    assert main(command(models("gpt2"), data, tmp_path / "out", "--max_seq_length", "600")) == 2
    assert "512 positions" in capsys.readouterr().err


def test_a_missing_model_folder_is_reported(dialogues, tmp_path, capsys):
    assert main(command(tmp_path / "nowhere", dialogues, tmp_path / "out")) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_run_that_failed_before_it_started_does_not_block_its_folder(models, dialogues, tmp_path):
    out = tmp_path / "out"
    assert main(command(tmp_path / "nowhere", dialogues, out)) == 2
    assert main(command(models("llama"), dialogues, out, "--max_steps", "1")) == 0
    assert status(out)["status"] == "finished"


def test_a_run_stopped_before_its_first_checkpoint_can_be_started_again(models, dialogues, tmp_path):
    # Once, a stopped run said that the same command starts again, and then that command was refused.
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text('{"status": "preempted"}')
    assert main(command(models("llama"), dialogues, out, "--max_steps", "1")) == 0
    assert status(out)["status"] == "finished"


def test_a_folder_without_a_model_is_refused_with_a_list_of_its_files(dialogues, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("hello")
    assert main(command(tmp_path / "model", dialogues, tmp_path / "out")) == 2
    assert "notes.txt" in capsys.readouterr().err


def test_an_unreachable_hub_is_reported_with_the_mirror_setting(dialogues, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(load_errors, "OFFLINE_BY_CHOICE", False)
    assert main(command("someone/some-model", dialogues, tmp_path / "out")) == 2
    assert "HF_ENDPOINT" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_keeps_the_last_whole_checkpoint(models, dialogues, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        flags = ["--max_steps", "40", "--save_steps", "2", "--save_total_limit", "40"]
        assert main(command(models("llama"), dialogues, disk / "out", *flags)) == 3
        said = capsys.readouterr().err
        assert "The disk is full" in said
        assert "Last complete checkpoint" in said
        # torch itself says "unexpected pos 341696 vs 341584" or "iostream error".
        assert re.search(r"checkpoint-\d+ could not be written: No space left on device\.", said)
        assert "Traceback" not in said
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        assert main([*command(models("llama"), dialogues, disk / "out", *flags), "--resume"]) == 0
        assert status(disk / "out")["status"] == "finished"
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_running_out_of_address_space_is_reported_as_out_of_memory(models, dialogues, tmp_path):
    """The same message in a real process whose memory the system limits."""
    limit = 6 << 30
    flags = ["--max_steps", "1", "--max_seq_length", "512", "--per_device_train_batch_size", "40"]
    script = (
        "import resource, sys, torch\n"
        "from atomtune.cli import main\n"
        "from atomtune.train import trainer as t\n"
        "real = t.target_nats\n"
        "def hungry(*a, **k):\n"
        f"    resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n"
        "    kept = [torch.ones(1 << 28) for _ in range(64)]\n"
        "    return real(*a, **k)\n"
        "t.target_nats = hungry\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command(models("llama"), dialogues, tmp_path / "out", *flags)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "Out of memory" in done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ("--report_to", "nonsense"),
        ("--optim", "nonsense"),
        ("--optim", "galore_adamw"),
        ("--fsdp", "full_shard"),
        ("--eval_strategy", "steps"),
        ("--eval_size", "40"),
        ("--device_map", "banana"),
    ],
)
def test_settings_the_library_refuses_are_user_errors_without_a_traceback(models, dialogues, tmp_path, flags, capsys):
    assert main(command(models("llama"), dialogues, tmp_path / "out", "--max_steps", "1", *flags)) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_output_folder_that_is_a_file_is_refused(models, dialogues, tmp_path, capsys):
    assert main(command(models("llama"), dialogues, dialogues, "--max_steps", "1")) == 2
    assert "cannot be made" in capsys.readouterr().err


def failing_disk(monkeypatch, fails) -> list[int]:
    """Saves for which `fails` is true end with the error of a full disk, after half of their files."""

    real, saves = torch.save, []

    def save(value, path, *args, **kwargs):
        if str(path).endswith("scheduler.pt"):
            saves.append(1)
            if fails(len(saves)):
                raise OSError(28, "No space left on device")
        real(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    return saves


def test_a_save_that_fails_leaves_nothing_and_the_next_is_tried(models, dialogues, tmp_path, monkeypatch, capsys):
    failing_disk(monkeypatch, lambda save: save in (2, 3, 5))  # three, but not in a row
    out = tmp_path / "out"
    flags = ["--max_steps", "12", "--save_steps", "2", "--save_total_limit", "9"]
    assert main(command(models("llama"), dialogues, out, *flags)) == 0
    assert {path.name for path in out.glob("*checkpoint*")} == {"checkpoint-2", "checkpoint-8", "checkpoint-12"}
    assert not list(out.glob(".saving*"))
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-4 could not be written: No space left on device" in said
    assert "Training continues; the next save tries again" in said
    assert any("checkpoint-6 could not be written" in notice for notice in status(out)["notices"])


def test_the_earlier_best_is_kept_if_the_best_step_cannot_be_saved(models, dialogues, tmp_path, monkeypatch):
    # Once the run ended with an error, because its best checkpoint did not exist, and the earlier one was removed.
    losses = {0: 9.0, 2: 5.0, 4: 1.0, 6: 8.0, 8: 7.0}
    monkeypatch.setattr(trainer.LoraTrainer, "_evaluation_sums", lambda self, _: (losses[self.state.global_step], 1))
    failing_disk(monkeypatch, lambda save: save == 2)
    out = tmp_path / "out"
    flags = ["--max_steps", "8", "--save_steps", "2", "--eval_size", "8", "--save_total_limit", "1"]
    assert main(command(models("llama"), dialogues, out, *flags)) == 0
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-8"}
    assert (status(out)["outcome"]["kept_step"], status(out)["eval_loss"]) == (2, 5.0)
    best = out / "checkpoint-2" / "adapter_model.safetensors"
    assert (out / "adapter_model.safetensors").read_bytes() == best.read_bytes()


def test_a_disk_that_stays_full_ends_the_run(models, dialogues, tmp_path, monkeypatch, capsys):
    saves = failing_disk(monkeypatch, lambda save: save > 1)
    out = tmp_path / "out"
    assert main(command(models("llama"), dialogues, out, "--max_steps", "40", "--save_steps", "2")) == 3
    assert len(saves) == 4
    said = capsys.readouterr().err
    assert "3 saves in a row failed" in said
    assert "checkpoint-2" in said
    assert status(out)["status"] == "failed"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_stop_whose_checkpoint_cannot_be_written_exits_with_an_error(
    models, dialogues, tmp_path, monkeypatch, capsys
):
    failing_disk(monkeypatch, lambda save: save > 1)
    flags = ["--max_steps", "40", "--save_steps", "2", "--max_minutes", "0.0001"]
    assert main(command(models("llama"), dialogues, tmp_path / "out", *flags)) == 75  # the first save is complete
    assert main(command(models("llama"), dialogues, tmp_path / "out", *flags, "--resume")) == 3
    assert "could not be written" in capsys.readouterr().err


def test_an_adapter_file_that_differs_from_the_weights_fails_the_run(models, dialogues, tmp_path, monkeypatch, capsys):
    import peft.peft_model

    real = peft.peft_model.safe_save_file

    def flipped(tensors, path, **kwargs):
        name = sorted(tensors)[0]
        real({**tensors, name: tensors[name] + 1e-7}, path, **kwargs)

    monkeypatch.setattr(peft.peft_model, "safe_save_file", flipped)
    assert main(command(models("llama"), dialogues, tmp_path / "out", "--max_steps", "2", "--dtype", "float32")) == 3
    assert "does not hold what was written" in capsys.readouterr().err
    assert status(tmp_path / "out")["status"] == "failed"


def test_a_non_finite_gradient_ends_the_run_before_the_update(models, dialogues, tmp_path, monkeypatch, capsys):
    from atomtune.train.trainer import LoraTrainer

    real = LoraTrainer.training_step

    def spoiled(self, model, inputs, num_items_in_batch=None):
        loss = real(self, model, inputs, num_items_in_batch)
        if self.state.global_step == 2:
            next(p for n, p in model.named_parameters() if "lora_A" in n).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(LoraTrainer, "training_step", spoiled)
    out = tmp_path / "out"
    assert main(command(models("llama"), dialogues, out, "--max_steps", "5", "--save_steps", "2")) == 3
    said = capsys.readouterr().err
    assert "A gradient is not finite at step 3" in said
    assert "dialogues.jsonl:" in said
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_disk_too_full_for_a_checkpoint_is_refused_before_the_first_step(models, dialogues, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert main(command(models("llama"), dialogues, tmp_path / "out", "--max_steps", "2")) == 3
    assert "The disk is full" in status(tmp_path / "out")["reason"]


def test_out_of_memory_while_loading_is_reported_as_such(models, dialogues, tmp_path, monkeypatch, capsys):
    from atomtune.train import model

    monkeypatch.setattr(model, "load_base", lambda *a, **k: torch.empty(1 << 50, dtype=torch.uint8))
    assert main(command(models("llama"), dialogues, tmp_path / "out", "--max_steps", "2")) == 3
    assert "--quantize nf4" in capsys.readouterr().err


@pytest.mark.slow
def test_a_closed_output_pipe_does_not_end_the_run(models, dialogues, tmp_path):
    words = [sys.executable, "-m", "atomtune", *command(models("llama"), dialogues, tmp_path / "out")]
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(words)} --max_steps 20 --save_steps 2 | head -1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "out")["status"] == "finished"


@pytest.mark.parametrize(("targets", "said"), [("input_layernorm", "linear layers here"), (",", "lora_targets")])
def test_targets_that_lora_cannot_adapt_are_refused(  # noqa: PLR0917  # pytest's fixtures
    models, dialogues, tmp_path, capsys, targets, said
):
    flags = ["--max_steps", "1", "--lora_targets", targets]
    assert main(command(models("llama"), dialogues, tmp_path / "out", *flags)) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


def test_a_final_save_that_fails_leaves_nothing_half_written(models, dialogues, tmp_path, monkeypatch, capsys):
    from atomtune.train import ending

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ending, "publish", full)
    out = tmp_path / "out"
    assert main(command(models("llama"), dialogues, out, "--max_steps", "2")) == 3
    assert "Last complete checkpoint" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {".lock", "run.json", "checkpoint-2"}
    monkeypatch.undo()
    assert main(command(models("llama"), dialogues, out, "--max_steps", "2", "--resume")) == 0


def test_a_signal_after_the_last_save_leaves_a_finished_run(models, dialogues, tmp_path, monkeypatch, capsys):
    # Once it ended with 75, and a scheduler started the finished run again.
    from atomtune.train import ending

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt("SIGTERM")

    monkeypatch.setattr(ending, "_outcome_of", stopped)
    out = tmp_path / "out"
    assert main(command(models("llama"), dialogues, out, "--max_steps", "2")) == 0
    assert "SIGTERM received while the report was written: the adapter is saved" in capsys.readouterr().out
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished" and record["steps"] == 2
    assert (out / "adapter_model.safetensors").is_file()


def test_a_signal_during_the_final_samples_keeps_the_outcome_and_report(
    models, dialogues, tmp_path, monkeypatch, capsys
):
    from atomtune.train.samples import Samples

    def stopped(self):
        raise KeyboardInterrupt("SIGINT")

    monkeypatch.setattr(Samples, "answer_after", stopped)
    out = tmp_path / "out"
    assert main(command(models("llama"), dialogues, out, "--max_steps", "2")) == 0
    screen = " ".join(capsys.readouterr().out.split())
    assert "SIGINT received while the tuned model answered" in screen
    assert "Done: 2 steps" in screen and "Next:" in screen
    assert json.loads((out / "run.json").read_text())["outcome"]["steps"] == 2 and (out / "report.html").is_file()


def test_a_checkpoint_with_non_finite_weights_is_not_saved(models, dialogues, tmp_path, monkeypatch, capsys):
    # Loss and gradient of the step were finite; only the next step's loss would show it, after the save.
    from transformers import Trainer

    real = Trainer._maybe_log_save_evaluate

    def spoiled(self, *args, **kwargs):
        if self.state.global_step == 3:
            with torch.no_grad():
                next(p for n, p in self.model.named_parameters() if "lora_A" in n)[0, 0] = float("inf")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", spoiled)
    out = tmp_path / "out"
    assert main(command(models("llama"), dialogues, out, "--max_steps", "5", "--save_steps", "1")) == 3
    assert "not finite; it is not saved" in capsys.readouterr().err
    assert {path.name for path in out.glob("*checkpoint*")} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_under_the_dataset_cache_is_named(models, dialogues, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], check=False).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "atomtune", *command(models("llama"), dialogues, tmp_path / "out")],
            env={**os.environ, "HF_DATASETS_CACHE": str(disk)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 3, done.stderr
        assert f"{disk} could not be written" in done.stderr
        assert "HF_DATASETS_CACHE" in done.stderr
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_after_the_last_save_leaves_a_finished_run(
    models, dialogues, tmp_path, monkeypatch, capsys
):
    # Once such a run was recorded as failed; without checkpoints, --resume repeated all its steps.
    from atomtune.train import ending

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ending, "write_page", full)
    out = tmp_path / "out"
    assert main(command(models("llama"), dialogues, out, "--max_steps", "2")) == 0
    assert "the report could not be written" in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize(
    ("mounted", "found"), [("ro", "Read-only file system"), ("size=64k", "there was no room for a batch")]
)
def test_unusable_shared_memory_is_not_reported_as_a_full_disk(models, dialogues, tmp_path, mounted, found):
    """Once the output folder was blamed; and if only a batch found no room, the run waited for it forever."""
    script = f'mount -t tmpfs -o {mounted} tmpfs /dev/shm && exec "$@" || exit 99'
    words = command(models("llama"), dialogues, tmp_path / "out", "--max_steps", "2", "--dataloader_num_workers", "1")
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script, "bash", sys.executable, "-m", "atomtune", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode in (1, 99) and "atomtune" not in done.stderr:
        pytest.skip("this machine does not let us mount")
    assert done.returncode == 3, done.stderr
    assert "/dev/shm, through which processes share memory, is full or cannot be written (" in done.stderr
    assert found in done.stderr
    assert "--dataloader_num_workers 0" in done.stderr and "Last complete checkpoint" in done.stderr
    assert "The disk is full" not in done.stderr
