"""Trials: the runs of a sweep, what each tried and gave, as sweep.json keeps them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from atomtune.disk import read_json_object, write_json
from atomtune.errors import BadSettings

RECORD = "sweep.json"

Status = Literal["waiting", "running", "finished", "pruned", "stopped", "failed"]
#: They have a result; a sweep that goes on leaves them as they are.
DONE = ("finished", "pruned")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    settings       what this trial tries: setting → value as written
    eval_loss      held-out loss of its adapter, in nats per token; of a pruned trial the lowest it had reached
    best_step      the step that adapter is of
    loss_before    held-out loss before the first step
    eval_history   (step, held-out loss), in order
    seconds        that its processes took, loading and evaluating included
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
        """Its folder in the sweep's, its file of settings and its log."""
        return f"trial-{self.number}"

    def words(self) -> str:
        """`learning_rate 3e-4, lora_rank 8`."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())


@dataclass(frozen=True)
class Sweep:
    """All that a sweep knows.

    shared            the settings of every trial, as written
    tried             setting → its values, or one range
    seconds_expected  of one trial without its evaluations, by `atomtune plan`; None where that cannot be told
    records_held_out  how many records decide; None until a trial has counted them
    """

    status: Literal["running", "stopped", "finished"]
    shared: Mapping[str, Any]
    tried: Mapping[str, tuple[str, ...]]
    trials: tuple[Trial, ...] = ()
    seconds_expected: float | None = None
    records_held_out: int | None = None

    def with_trial(self, trial: Trial) -> "Sweep":
        """The same with this trial in the place of the one with its number, or behind all."""
        trials = {**{other.number: other for other in self.trials}, trial.number: trial}
        return replace(self, trials=tuple(trials.values()))

    def ranked(self) -> list[Trial]:
        """Finished trials, the lowest held-out loss first; of equal ones the earlier."""
        finished = [trial for trial in self.trials if trial.status == "finished" and trial.eval_loss is not None]
        return sorted(
            finished, key=lambda trial: (math.inf if trial.eval_loss is None else trial.eval_loss, trial.number)
        )

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
    """The sweep that a folder holds; None where it holds none. Raises BadSettings for a record that is not ours."""
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


#: Reads a record and checks every value in it.
_SWEEPS = TypeAdapter(Sweep)
