"""Start: decides from the folder and the flags how a run starts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from atomtune.choices import ADAPTER_CONFIG, RUN_RECORD
from atomtune.disk import expanded
from atomtune.errors import BadModel, BadSettings, listing
from atomtune.model.adapter_folder import WEIGHTS, adapter_file
from atomtune.model.file_schemas import TrainerState
from atomtune.model.json_files import checked
from atomtune.train.checkpoint.atomic import MANIFEST, checkpoints, damage, newest_undamaged, step_in
from atomtune.train.checkpoint.state import has_optimizer, refuse_programs
from atomtune.train.run_report import read_record

STATE = "trainer_state.json"
#: Files beside the checkpoints that a run writes, under names that other programs and people use too. run.json is not
#: among them: it is taken for a run's, and an unreadable one counts as missing.
_WRITTEN = (
    *("README.md", "report.html", "loss.png", ADAPTER_CONFIG),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)


@dataclass(frozen=True)
class Fresh:
    """The run starts with a new adapter on the base."""

    name: ClassVar[str] = "fresh"  # "start" in run.json
    message: str = ""


@dataclass(frozen=True)
class Resumed:
    """The run that wrote this checkpoint continues, with its whole state."""

    checkpoint: Path
    step: int
    name: ClassVar[str] = "resume"

    def lies_in(self, folder: Path) -> bool:
        """Whether the run continues in the folder of its checkpoint."""
        return self.checkpoint.resolve().parent == folder.resolve()

    @property
    def message(self) -> str:
        without = " It holds no optimizer state (--save_only_model), so the optimizer starts from scratch."
        return (
            f"Resuming from {self.checkpoint} at step {self.step:,}.{'' if has_optimizer(self.checkpoint) else without}"
        )


@dataclass(frozen=True)
class FromWeights:
    """A new run starts with the adapter weights of another one."""

    file: Path
    name: ClassVar[str] = "weights"

    @property
    def message(self) -> str:
        return (
            f"{self.file} holds weights only: starting from them with a new optimizer, schedule and order of the data."
        )


@dataclass(frozen=True)
class Finished:
    """Nothing to do: the run in this folder has finished."""

    folder: Path

    @property
    def message(self) -> str:
        return f"The run in {self.folder} is already finished; nothing to resume."


Start = Fresh | Resumed | FromWeights


def beginning(start: Start, output_dir: Path) -> str:
    """How the run in a folder began, for run.json; continuing it in the same folder does not change that."""
    if isinstance(start, Resumed) and start.lies_in(output_dir):
        return str(read_record(output_dir).get("start", Fresh.name))
    return start.name


def holds_a_run(folder: Path) -> bool:
    """Whether a folder holds the output of a run. A run that ended before its first checkpoint does not count."""
    unfinished = read_record(folder).get("status") in (None, "failed", "preempted")
    return (
        (folder / WEIGHTS).exists() or bool(checkpoints(folder)) or ((folder / RUN_RECORD).exists() and not unfinished)
    )


def find_start(
    output_dir: Path,
    *,
    resume: bool,
    resume_from_checkpoint: str | None,
    checkpoint: str | None,
    lengths: dict[str, Any],
    notice: Callable[[str], None],
) -> Start | Finished:
    """Decide from the folder and the flags how the run starts.

    lengths  max_steps and num_train_epochs of this command; epochs None if they are left to the run
    Raises BadSettings if the folder holds a run and no flag says to continue it, or if the two runs would mix.
    Raises BadModel for a damaged checkpoint.
    """
    if resume_from_checkpoint and resume_from_checkpoint.lower() == "true":
        newest = newest_undamaged(output_dir, notice=notice)
        if newest is None:
            raise BadSettings([f"--resume_from_checkpoint: no complete checkpoint in {output_dir}."])
        return _resumed(newest)
    if named := resume_from_checkpoint or checkpoint:
        start = _named(expanded(named), output_dir)
        _refuse_to_mix(start, output_dir)
        return start
    if resume:
        return _last_run_in(output_dir, lengths, notice)
    if holds_a_run(output_dir):
        raise BadSettings(
            [f"{output_dir} already holds a run. --resume continues it; another --output_dir starts a new one."]
        )
    return Fresh()


def _last_run_in(output_dir: Path, lengths: dict[str, Any], notice: Callable[[str], None]) -> Start | Finished:
    record = read_record(output_dir)
    finished = record.get("status") == "finished" and (output_dir / WEIGHTS).is_file()
    if finished and not _asks_for_more(record, lengths):
        return Finished(output_dir)
    newest = newest_undamaged(output_dir, notice=notice)
    if newest is not None:
        return _resumed(newest)
    if record.get("start") == Resumed.name:
        raise BadSettings(
            [
                f"The run in {output_dir} continued a checkpoint of another folder and has no complete one of its own; "
                "--resume would start from the beginning.\nRepeat the command that started it: "
                "--resume_from_checkpoint CHECKPOINT."
            ]
        )
    if record.get("start") == FromWeights.name:
        raise BadSettings(
            [
                f"The run in {output_dir} started from weights and has no complete checkpoint; --resume would start "
                "without them.\nRepeat the command that started it: --continue_training --checkpoint WEIGHTS."
            ]
        )
    return Fresh(f"--resume: no complete checkpoint in {output_dir}; starting from the beginning.")


def _resumed(checkpoint: Path) -> Resumed:
    refuse_programs(checkpoint)
    return Resumed(checkpoint, step_of(checkpoint))


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written. Raises BadModel if its state cannot be read."""
    try:
        return checked(checkpoint / STATE, TrainerState).global_step
    except BadModel as error:
        raise BadModel(
            f"{error}\nUse another checkpoint, or only its weights: --continue_training --checkpoint "
            f"{adapter_file(checkpoint)}"
        ) from None


def _named(path: Path, output_dir: Path) -> Resumed | FromWeights:
    if not path.exists():
        others = checkpoints(path.parent) or checkpoints(output_dir)
        there = f" There are: {', '.join(map(str, others))}." if others else ""
        raise BadSettings([f"{path}: no such checkpoint.{there}"])
    if path.is_dir() and (path / STATE).is_file():
        problems = damage(path) if (path / MANIFEST).is_file() else []
        if problems:
            raise BadModel(
                f"{path} is damaged:\n{listing(problems)}\nUse an older checkpoint, or --resume to find one."
            )
        return _resumed(path)
    file = adapter_file(path)
    if file is None:
        raise BadSettings([f"{path}: neither a checkpoint nor adapter weights ({WEIGHTS}, adapter_model.bin) here."])
    return FromWeights(file)


def _refuse_to_mix(start: Resumed | FromWeights, output_dir: Path) -> None:
    """Raise BadSettings if this run would overwrite a finished adapter, or leave two runs' checkpoints in one folder.

    In the second case a later --resume could not tell this run's checkpoints from those of the earlier run.
    """
    step = start.step if isinstance(start, Resumed) else -1
    beyond = [path for path in checkpoints(output_dir) if (path / MANIFEST).is_file() and step_in(path) > step]
    if beyond:
        raise BadSettings(
            [
                f"{output_dir} holds {', '.join(path.name for path in reversed(beyond))} of an earlier run, which "
                "--resume would later mistake for this run's.\nPass another --output_dir, or move them away."
            ]
        )
    goes_on = isinstance(start, Resumed) and start.lies_in(output_dir)
    if (output_dir / WEIGHTS).exists() and not goes_on:
        raise BadSettings(
            [f"{output_dir} holds the adapter of a finished run, which this one would overwrite. Pass another one."]
        )


def foreign_files(output_dir: Path) -> list[str]:
    """Files that a new run would overwrite and that no run wrote, for example the README.md of the user's project.

    Files left behind by a failed run are a run's; run.json shows that. Symbolic links are not listed, because a link is
    replaced itself, not the file that it leads to.
    """
    names = [name for name in _WRITTEN if (output_dir / name).is_file() and not (output_dir / name).is_symlink()]
    is_a_runs = bool(names) and (holds_a_run(output_dir) or "status" in read_record(output_dir))
    return [] if is_a_runs else names


def _asks_for_more(record: dict[str, Any], lengths: dict[str, Any]) -> bool:
    """Whether a finished run should become longer: by steps made, or by epochs in its settings."""
    before = record.get("lengths", lengths)
    if lengths == before:
        return False
    if lengths["max_steps"] > 0:
        return bool(lengths["max_steps"] > record.get("steps", 0))
    epochs = lengths["num_train_epochs"]
    return before["max_steps"] > 0 or (epochs is not None and bool(epochs > before["num_train_epochs"]))
