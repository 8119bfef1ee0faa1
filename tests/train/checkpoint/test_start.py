"""How a run starts, decided from the folder and the flags: anew, from a checkpoint, from weights, or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest

from atomtune.errors import BadModel, BadSettings
from atomtune.train.checkpoint.atomic import seal, staging_of
from atomtune.train.checkpoint.start import Finished, Fresh, FromWeights, Resumed, beginning, find_start, foreign_files

LENGTHS = {"max_steps": 8, "num_train_epochs": 3.0}


def checkpoint(folder: Path, step: int) -> Path:
    """A complete checkpoint of this step, as far as the decision reads it."""
    final = folder / f"checkpoint-{step}"
    staging = staging_of(final)
    staging.mkdir(parents=True)
    (staging / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 8}))
    (staging / "adapter_model.safetensors").write_bytes(b"weights")
    seal(staging, final, {})
    return final


def record(folder: Path, **values: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"lengths": LENGTHS, **values}))


def started(folder: Path, *, resume: bool = False, named: Path | str | None = None, **lengths: Any) -> Any:
    notices: list[str] = []
    name = None if named is None else str(named)
    return find_start(
        folder,
        resume=resume,
        resume_from_checkpoint=name,
        checkpoint=None,
        lengths={**LENGTHS, **lengths},
        notice=notices.append,
    )


def test_a_run_that_continued_another_folders_checkpoint_does_not_start_over(tmp_path):
    # Regression: killed before its first checkpoint, it was resumed at step 0, with a new adapter.
    kept, out = checkpoint(tmp_path / "old", 4), tmp_path / "new"
    start = started(out, named=kept)
    assert start == Resumed(kept, 4)
    record(out, status="running", start=beginning(start, out))
    with pytest.raises(BadSettings, match="continued a checkpoint of another folder and has no complete one"):
        started(out, resume=True)
    assert started(out, named=kept) == start  # the advice works


def test_continuing_in_the_same_folder_does_not_change_how_the_run_began(tmp_path):
    for begins in (Fresh.name, FromWeights.name, Resumed.name):
        out = tmp_path / begins
        record(out, status="running", start=begins)
        start = started(out, named=checkpoint(out, 4))
        assert beginning(start, out) == begins


@pytest.mark.parametrize(
    ("before", "now", "goes_on"),
    [
        ({}, {}, False),
        ({}, {"max_steps": 9}, True),
        ({}, {"max_steps": 7}, False),
        # Ended early, after 8 steps: 9 are more, 8 are not, and 20 is what it had
        ({"max_steps": 20}, {"max_steps": 20}, False),
        ({"max_steps": 20}, {"max_steps": 9}, True),
        ({"max_steps": 20}, {"max_steps": 8}, False),
        ({"max_steps": 20}, {"max_steps": -1}, True),
        ({"max_steps": -1}, {"max_steps": -1, "num_train_epochs": 3.5}, True),
        ({"max_steps": -1}, {"max_steps": -1, "num_train_epochs": 2.5}, False),
        ({"max_steps": -1}, {"max_steps": -1, "num_train_epochs": None}, False),
    ],
)
def test_a_finished_run_goes_on_only_if_it_is_to_be_longer(tmp_path, before, now, goes_on):
    kept = checkpoint(tmp_path, 8)
    (tmp_path / "adapter_model.safetensors").touch()
    record(tmp_path, status="finished", steps=8, lengths={**LENGTHS, **before})
    assert started(tmp_path, resume=True, **now) == (Resumed(kept, 8) if goes_on else Finished(tmp_path))


def test_a_finished_run_whose_adapter_is_gone_is_finished_again(tmp_path):
    kept = checkpoint(tmp_path, 8)
    record(tmp_path, status="finished", steps=8)
    assert started(tmp_path, resume=True) == Resumed(kept, 8)


def test_a_damaged_checkpoint_is_refused_if_it_is_named(tmp_path):
    whole, torn = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    (torn / "adapter_model.safetensors").write_bytes(b"weighty")
    with pytest.raises(BadModel, match=f"{torn} is damaged:\nadapter_model.safetensors has changed"):
        started(tmp_path, named=torn)
    assert started(tmp_path, named="true") == started(tmp_path, resume=True) == Resumed(whole, 4)
    (whole / "manifest.json").write_text("{}")
    with pytest.raises(BadSettings, match=f"no complete checkpoint in {tmp_path}"):
        started(tmp_path, named="True")


def test_only_the_newest_checkpoint_of_a_folder_is_continued_there(tmp_path):
    older, newest = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    (tmp_path / "adapter_model.safetensors").touch()
    assert started(tmp_path, named=newest) == Resumed(newest, 8)
    with pytest.raises(BadSettings, match="holds checkpoint-8 of an earlier run"):
        started(tmp_path, named=older)
    (newest / "manifest.json").unlink()  # of another tool: --resume would not take it for this run's
    assert started(tmp_path, named=older) == Resumed(older, 4)


def test_a_path_that_is_no_checkpoint_is_refused_with_those_that_are_there(tmp_path):
    there = checkpoint(tmp_path / "out", 4)
    for missing in (tmp_path / "out" / "checkpoint-5", tmp_path / "checkpoint-4"):
        with pytest.raises(BadSettings, match=f"{missing}: no such checkpoint. There are: {there}.$"):
            started(tmp_path / "out", named=missing)
    with pytest.raises(BadSettings, match="neither a checkpoint nor adapter weights"):
        started(tmp_path / "new", named=tmp_path)


@pytest.mark.parametrize("holds", ["an adapter of another tool", "a stopped run's checkpoint", "a killed run"])
def test_a_folder_with_results_is_not_started_in_again(tmp_path, holds):
    if holds == "an adapter of another tool":
        (tmp_path / "adapter_model.safetensors").touch()
    else:
        record(tmp_path, status="running" if holds == "a killed run" else "preempted")
    if holds == "a stopped run's checkpoint":
        checkpoint(tmp_path, 4)
    with pytest.raises(BadSettings, match="already holds a run"):
        started(tmp_path)


def test_the_message_names_a_missing_optimizer_state_and_the_weights_to_use_instead(tmp_path):
    kept = checkpoint(tmp_path, 4)
    assert "It holds no optimizer state" in started(tmp_path, resume=True).message
    (kept / "optimizer.pt").touch()
    assert Resumed(kept, 4).message == f"Resuming from {kept} at step 4."


def test_only_files_that_no_run_wrote_are_foreign(tmp_path):
    (tmp_path / "README.md").touch()
    (tmp_path / "loss.png").symlink_to(tmp_path / "README.md")  # the link itself would be replaced
    assert foreign_files(tmp_path) == ["README.md"]
    record(tmp_path, status="failed")  # in the middle of its last save
    assert foreign_files(tmp_path) == []
