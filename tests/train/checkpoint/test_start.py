"""How a run starts, decided from the folder and the flags: anew, from a checkpoint, from weights, or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest

from atomtune.errors import BadSettings
from atomtune.train.checkpoint.atomic import seal, staging_of
from atomtune.train.checkpoint.start import Fresh, FromWeights, Resumed, beginning, find_start

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
