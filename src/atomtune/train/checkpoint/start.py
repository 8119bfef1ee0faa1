"""Checkpoints: where a run may start from.

Before: integrity.py says which are whole.  After: run.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atomtune.errors import BadModel, BadSettings, listing
from atomtune.model.adapter_folder import WEIGHTS, adapter_file
from atomtune.train.checkpoint.atomic import MANIFEST, checkpoints, damage, step_in
from atomtune.train.run_report import RECORD, read_record

STATE = "trainer_state.json"


@dataclass(frozen=True)
class Start:
    """How a run begins: afresh, from a checkpoint with its state, from weights alone, or not at all any more."""

    kind: Literal["fresh", "resume", "weights", "finished"]
    path: Path | None = None
    said: str = ""


def newest_whole(folder: Path, notice: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; those passed over are said."""
    for path in checkpoints(folder):
        problems = damage(path)
        if not problems:
            return path
        notice(f"{path.name} is passed over: {listing(problems, 3)}.")
    return None


def holds_a_run(folder: Path) -> bool:
    """Whether a folder already is some run's output; one that failed before its first checkpoint left nothing."""
    unfinished = read_record(folder).get("status") in (None, "failed")
    return (folder / WEIGHTS).exists() or bool(checkpoints(folder)) or ((folder / RECORD).exists() and not unfinished)


def find_start(
    output_dir: Path,
    *,
    resume: bool,
    resume_from_checkpoint: str | None,
    checkpoint: str | None,
    lengths: dict[str, Any],
    notice: Callable[[str], None],
) -> Start:
    """Decide from the folder and the flags.

    lengths  max_steps and num_train_epochs as asked now
    Raises BadSettings when the folder holds a run and no flag says to go on, or one that this would mix with another;
    BadModel for a damaged checkpoint.
    """
    if resume_from_checkpoint and resume_from_checkpoint.lower() == "true":
        newest = newest_whole(output_dir, notice)
        if newest is None:
            raise BadSettings([f"--resume_from_checkpoint: no whole checkpoint in {output_dir}."])
        return _resumed(newest)
    if explicit := resume_from_checkpoint or checkpoint:
        start = _explicit(Path(explicit).expanduser(), output_dir)
        _refuse_to_mix(start, output_dir)
        return start
    if not resume:
        if holds_a_run(output_dir):
            raise BadSettings(
                [f"{output_dir} already holds a run. --resume goes on with it; another --output_dir starts a new one."]
            )
        return Start("fresh")
    record = read_record(output_dir)
    if record.get("status") == "finished" and not _asks_for_more(record, lengths):
        return Start("finished", output_dir, f"The run in {output_dir} is already finished; nothing to resume.")
    newest = newest_whole(output_dir, notice)
    if newest is None and record.get("start") == "weights":
        raise BadSettings(
            [
                f"The run in {output_dir} began from weights and has no whole checkpoint; --resume would begin without "
                "them.\nGive the command it began with once more: --continue_training --checkpoint WEIGHTS."
            ]
        )
    if newest is None:
        return Start("fresh", None, f"--resume: no whole checkpoint in {output_dir}; starting from the beginning.")
    return _resumed(newest)


def _resumed(path: Path) -> Start:
    said = f"Going on from {path} at step {step_of(path):,}."
    if not _has_optimizer(path):
        said += " It holds no optimizer state (--save_only_model), so the optimizer begins anew."
    return Start("resume", path, said)


def step_of(path: Path) -> int:
    """The step after which a checkpoint was made. Raises BadModel where its state does not say."""
    try:
        return int(json.loads((path / STATE).read_text(encoding="utf-8"))["global_step"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadModel(
            f"{path / STATE} is not readable as a run's state ({error}).\n"
            f"Take another checkpoint, or its weights alone: --continue_training --checkpoint {adapter_file(path)}"
        ) from error


def _has_optimizer(path: Path) -> bool:
    """Whether the checkpoint holds an optimizer: ours, another tool's, or DeepSpeed's global_step folder."""
    return any(path.glob("optimizer*")) or any(path.glob("global_step*"))


def _explicit(path: Path, output_dir: Path) -> Start:
    if not path.exists():
        there = ", ".join(str(found) for found in checkpoints(path.parent) or checkpoints(output_dir))
        raise BadSettings([f"{path}: no such checkpoint. {f'There are: {there}.' if there else ''}".rstrip()])
    if path.is_dir() and (path / STATE).is_file():
        problems = damage(path) if (path / MANIFEST).is_file() else []
        if problems:
            raise BadModel(
                f"{path} is damaged:\n{listing(problems)}\nTake an older checkpoint, or --resume to find one."
            )
        return _resumed(path)
    file = adapter_file(path)
    if file is None:
        raise BadSettings([f"{path}: neither a checkpoint nor adapter weights ({WEIGHTS}, adapter_model.bin) here."])
    return Start(
        "weights",
        file,
        f"{file} holds weights only: starting from them with a new optimizer, schedule and order of the data.",
    )


def _refuse_to_mix(start: Start, output_dir: Path) -> None:
    """Raise BadSettings where this run would overwrite a finished one's adapter, or where a later --resume could not
    tell this run's checkpoints from those of the run before."""
    step = step_of(start.path) if start.kind == "resume" and start.path else -1
    beyond = [path for path in checkpoints(output_dir) if (path / MANIFEST).is_file() and (step_in(path) or 0) > step]
    if beyond:
        raise BadSettings(
            [
                f"{output_dir} holds {', '.join(path.name for path in reversed(beyond))} of an earlier run, which "
                "--resume would later take for this one's.\nPass another --output_dir, or move them away."
            ]
        )
    goes_on = start.kind == "resume" and start.path and start.path.resolve().parent == output_dir.resolve()
    if (output_dir / WEIGHTS).exists() and not goes_on:
        raise BadSettings(
            [f"{output_dir} holds the adapter of a finished run, which this one would overwrite. Pass another one."]
        )


def _asks_for_more(record: dict[str, Any], lengths: dict[str, Any]) -> bool:
    """Whether a finished run is to be longer; steps are compared with those made, epochs with those asked for."""
    before = record.get("lengths", lengths)
    if lengths == before:
        return False
    if lengths["max_steps"] > 0:
        return bool(lengths["max_steps"] > record.get("steps", 0))
    return before["max_steps"] > 0 or bool(lengths["num_train_epochs"] > before["num_train_epochs"])
