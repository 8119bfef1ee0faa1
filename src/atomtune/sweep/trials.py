"""Trials: the runs of a sweep with their settings and results, as sweep.json holds them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from atomtune.disk import read_json_object, write_json
from atomtune.errors import BadSettings

RECORD = "sweep.json"

Status = Literal["waiting", "running", "finished", "pruned", "stopped", "failed"]
#: Trials with a result, which a resumed sweep does not repeat.
DONE = ("finished", "pruned")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    settings       the values that this trial tries: setting → value as written
    eval_loss      held-out loss of its adapter, in nats per token; for a pruned trial, the lowest that it reached
    best_step      the step of that loss
    loss_before    held-out loss before the first step
    eval_history   (step, held-out loss), in order
    seconds        the time of its processes, with loading and evaluation
    reason         why it failed
    """

    number: int
    settings: Mapping[str, str]
    status: Status = "waiting"
    eval_loss: float | None = None
    best_step: int | None = None
    loss_before: float | None = None
    eval_history: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    reason: str | None = None

    @property
    def name(self) -> str:
        """The name of its folder, its settings file and its log."""
        return f"trial-{self.number}"

    def words(self) -> str:
        """`learning_rate 3e-4, lora_rank 8`."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())


@dataclass(frozen=True)
class Sweep:
    """A sweep as recorded in sweep.json.

    shared            the settings of every trial, as written
    tried             setting → its values, or one range
    seconds_expected  estimate by `atomtune plan` for one trial without its evaluations; None if there is none
    records_held_out  the number of held-out records; None until a trial has counted them
    """

    status: Literal["running", "stopped", "finished"]
    shared: Mapping[str, Any]
    tried: Mapping[str, tuple[str, ...]]
    trials: tuple[Trial, ...] = ()
    seconds_expected: float | None = None
    records_held_out: int | None = None

    def with_trial(self, trial: Trial) -> "Sweep":
        """A copy in which this trial replaces the one with its number, or comes last."""
        trials = {**{other.number: other for other in self.trials}, trial.number: trial}
        return replace(self, trials=tuple(trials.values()))

    def ranked(self) -> list[Trial]:
        """Finished trials, the lowest held-out loss first; of equal ones, the earlier first."""
        finished = [trial for trial in self.trials if trial.status == "finished" and trial.eval_loss is not None]
        return sorted(finished, key=lambda trial: (trial.eval_loss or 0.0, trial.number))

    @property
    def best(self) -> Trial | None:
        return next(iter(self.ranked()), None)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["best"] = self.best.name if self.best else None
        return values


def write_sweep(folder: Path, sweep: Sweep) -> None:
    write_json(folder / RECORD, sweep.to_json())


def read_sweep_record(folder: Path) -> Sweep | None:
    """The sweep that a folder holds, or None. Raises BadSettings for a sweep.json that `sweep` did not write."""
    try:
        sweep = _SWEEPS.validate_python(read_json_object(folder / RECORD))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise BadSettings(
            [f"{folder / RECORD}: {place} is not as a sweep writes it. Pass another --output_dir."]
        ) from None
    except (OSError, ValueError) as error:
        raise BadSettings([f"{folder / RECORD} cannot be read ({error}). Pass another --output_dir."]) from None
    return replace(sweep, status="running")


#: Reads sweep.json and checks every value.
_SWEEPS = TypeAdapter(Sweep)
