"""Values that are not finite spoil no adapter: their step is skipped or ends the run, and its records are named."""

import json
from itertools import count
from typing import Any

import pytest

from atomtune.cli import main
from atomtune.train import non_finite, trainer
from tests.walk.test_failures import command, status


def losses_times(monkeypatch: pytest.MonkeyPatch, factor: float, *batches: int) -> None:
    """Multiply the losses of these batches, counted from 1."""
    real, numbers = trainer.target_nats, count(1)

    def target_nats(model: Any, batch: Any, **kwargs: Any) -> Any:
        nats, targets = real(model, batch, **kwargs)
        return (nats * factor if next(numbers) in batches else nats), targets

    monkeypatch.setattr(trainer, "target_nats", target_nats)


def test_a_non_finite_loss_ends_the_run_before_it_changes_the_adapter(models, dialogues, tmp_path, monkeypatch, capsys):
    losses_times(monkeypatch, float("nan"), 3)
    out = tmp_path / "out"
    assert main(command(models("llama"), dialogues, out, "--max_steps", "5", "--save_steps", "2")) == 3
    said = capsys.readouterr().err
    assert "nan at step 3" in said
    assert "dialogues.jsonl:" in said
    assert status(out)["status"] == "failed"
    assert (out / "checkpoint-2" / "manifest.json").exists()
    assert not (out / "adapter_model.safetensors").exists()


def test_a_non_finite_evaluation_loss_fails_the_run_and_names_the_record(
    models, dialogues, tmp_path, monkeypatch, capsys
):
    real = trainer.target_nats

    def failing(model, batch, **kwargs):
        nats, count = real(model, batch, **kwargs)
        spoiled = not model.training and "dialogues.jsonl:7" in batch["origins"]
        return (nats * float("nan") if spoiled else nats), count

    monkeypatch.setattr(trainer, "target_nats", failing)
    out = tmp_path / "out"
    flags = ["--max_steps", "4", "--eval_path", str(dialogues), "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--per_device_eval_batch_size", "1", "--save_steps", "1"]
    assert main(command(models("llama"), dialogues, out, *flags)) == 3
    said = capsys.readouterr().err
    assert "The evaluation loss is nan at step 0" in said
    assert "\ndialogues.jsonl:7\n" in said
    assert "dialogues.jsonl:8" not in said
    assert status(out)["status"] == "failed"
    assert "NaN" not in (out / "run.json").read_text()
    assert not (out / "adapter_model.safetensors").exists()


def test_non_finite_steps_are_skipped_when_requested(models, dialogues, tmp_path, monkeypatch, capsys):
    losses_times(monkeypatch, float("inf"), 3, 5)
    out = tmp_path / "out"
    flags = ["--max_steps", "6", "--skip_nonfinite", "2", "--layout", "padded", "--logging_steps", "2"]
    assert main(command(models("llama"), dialogues, out, *flags)) == 0
    record = status(out)
    assert record["skipped_steps"] == 2
    losses = [entry["loss"] for entry in record["loss_history"]]
    assert len(losses) == 4  # for the first step and for every second one
    assert all(6 < loss < 12 for loss in losses), "a step left out is not a loss of 0"
    said = capsys.readouterr().out
    assert "at step 3, in a batch with these records" in said
    assert "(2 of at most 2)" in said


def test_checking_steps_one_step_later_gives_the_same_run(models, dialogues, tmp_path, monkeypatch, capsys):
    # On a GPU the step is skipped on the device and reported during the next one.
    copied, copy = [], non_finite._copied_to_host
    monkeypatch.setattr(non_finite, "_copied_to_host", lambda numbers: (copied.append(1), copy(numbers))[1])
    flags = ["--max_steps", "6", "--skip_nonfinite", "2", "--logging_steps", "2", "--save_steps", "3"]
    flags += ["--eval_size", "0", "--layout", "padded"]
    for name, devices in (("now", ()), ("later", ("cpu",))):
        with monkeypatch.context() as within:
            within.setattr(non_finite, "JUDGED_LATER", devices)
            losses_times(within, float("nan"), 3, 6)
            assert main(command(models("llama"), dialogues, tmp_path / name, *flags)) == 0
        said = capsys.readouterr().out
        assert "at step 3, in a batch" in said
        assert "at step 6, in a batch" in said
    assert len(copied) == 6, "the second run's steps"
    now, later = tmp_path / "now", tmp_path / "later"
    for file in ("adapter_model.safetensors", "checkpoint-3/adapter_model.safetensors", "checkpoint-3/optimizer.pt"):
        assert (now / file).read_bytes() == (later / file).read_bytes(), file
    for figure in ("loss_history", "skipped_steps", "notices"):
        assert status(now)[figure] == status(later)[figure], figure
    states = [json.loads((out / "checkpoint-3/trainer_state.json").read_text()) for out in (now, later)]
    counted = [state["stateful_callbacks"]["WorkCounter"]["attributes"]["skipped_steps"] for state in states]
    assert counted == [1, 1], "a checkpoint knows what its last step was"


def test_a_non_finite_last_step_that_is_checked_later_is_not_saved(models, dialogues, tmp_path, monkeypatch, capsys):
    losses_times(monkeypatch, float("nan"), 4)
    monkeypatch.setattr(non_finite, "JUDGED_LATER", ("cpu",))
    flags = ["--max_steps", "4", "--save_steps", "2", "--eval_size", "0", "--layout", "padded"]
    assert main(command(models("llama"), dialogues, tmp_path / "out", *flags)) == 3
    assert "nan at step 4, in a batch with these records" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert status(tmp_path / "out")["status"] == "failed"


def test_a_step_with_gradients_clipped_to_zero_is_reported(models, dialogues, tmp_path, monkeypatch, capsys):
    losses_times(monkeypatch, 1e30, 3)
    flags = ["--max_steps", "4", "--layout", "padded", "--dtype", "float32"]
    assert main(command(models("llama"), dialogues, tmp_path / "out", *flags)) == 0
    assert "every gradient is zero at step 3" in capsys.readouterr().out
    record = status(tmp_path / "out")
    assert (record["steps_without_gradient"], record["skipped_steps"]) == (1, 0)


def test_a_skipped_first_step_raises_no_missing_gradient_warning(models, dialogues, tmp_path, monkeypatch):
    losses_times(monkeypatch, float("nan"), 1)
    flags = ["--max_steps", "3", "--skip_nonfinite", "1"]
    assert main(command(models("llama"), dialogues, tmp_path / "out", *flags)) == 0
    notices = status(tmp_path / "out")["notices"]
    assert any("The step is skipped" in notice for notice in notices)
    assert not any("no gradient reaches" in notice for notice in notices)
