"""Run report: run.json and loss.png of a run."""

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atomtune import __version__
from atomtune.choices import RUN_RECORD
from atomtune.disk import read_json_object, write_json
from atomtune.errors import BadSettings
from atomtune.folders import identity_of
from atomtune.language import message
from atomtune.pages import label, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "loss.png"
LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "safetensors")


class RunRecord:
    """run.json of a run, written from its beginning: its status is `running`, or how the run ended.

    writes  whether this rank writes the file
    waits   whether writing waits until `begin`
    """

    def __init__(self, folder: Path, *, writes: bool = True, waits: bool = False) -> None:
        self.folder, self.writes, self.waits = folder, writes, waits
        self._folder_identity = identity_of(folder)
        self.values: dict[str, Any] = {
            "status": "running",
            "atomtune": __version__,
            "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
            "machine": platform.machine(),
            "notices": [],
        }

    def update(self, **values: Any) -> None:
        self.values |= values
        self.values["updated"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        if not self.writes or self.waits:
            return
        if self._folder_identity is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._folder_identity = identity_of(self.folder)
        if identity_of(self.folder) == self._folder_identity:  # not if another folder has replaced it
            write_json(self.folder / RUN_RECORD, self.values)

    def begin(self) -> None:
        """Start writing, which replaces the run.json of an earlier run."""
        self.waits = False
        self.update()


def logged(log_history: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """step → a value of this name (`loss`, `eval_loss`), for the entries of the Trainer's log that have it."""
    return {entry["step"]: entry[name] for entry in log_history if name in entry}


def histories(log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The training and held-out losses in the Trainer's log, as run.json stores them."""
    return {
        key: [{"step": step, "loss": loss} for step, loss in logged(log_history, name).items()]
        for key, name in (("loss_history", "loss"), ("eval_history", "eval_loss"))
    }


def draw_loss(history: list[dict[str, Any]], path: Path, *, title: str = "") -> None:
    """Draw the training loss (each logged value, and smoothed) and the held-out loss with its best value."""
    with picture(path, loss=message("loss per token (nats)"), title=title) as axes:
        draw_training(axes, list(logged(history, "loss").items()))
        draw_held_out(axes, list(logged(history, "eval_loss").items()))


def draw_training(axes: "Axes", points: list[tuple[int, float]]) -> None:
    """A pale line through all logged losses, and a strong one through the smoothed losses."""
    if points:
        steps, losses = zip(*points, strict=True)
        smooth = smoothed(losses)
        axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=1)
        axes.plot(steps, smooth, color="C0", linewidth=1.8, label=label(f"training, smoothed: last {smooth[-1]:.3f}"))


def draw_held_out(axes: "Axes", points: list[tuple[int, float]]) -> None:
    """The held-out loss with a star at its lowest value; the legend names both, and no number twice."""
    if points:
        steps, losses = zip(*points, strict=True)
        best_step, best = min(points, key=lambda point: point[1])
        line, star = f"held out: last {losses[-1]:.3f}", f"best: {best:.3f} at step {best_step:,}"
        if best_step == steps[-1]:
            line, star = message("held out"), f"best and last: {best:.3f} at step {best_step:,}"
        axes.plot(steps, losses, "o-", color="C1", linewidth=1.6, markersize=4, label=label(line))
        axes.plot([best_step], [best], "*", color="C1", markersize=13, linestyle="none", label=label(star))


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of a tenth of all points around each point. A mean over earlier points only would lag behind."""
    reach = len(losses) // 20
    return [statistics.fmean(losses[max(0, at - reach) : at + reach + 1]) for at in range(len(losses))]


def read_record(folder: Path) -> dict[str, Any]:
    """The folder's run.json, without values of unexpected types; empty if it is missing or cannot be read.

    Raises BadSettings if a folder has that name, because no run could write its record.
    """
    path = folder / RUN_RECORD
    if path.is_dir():
        raise BadSettings([f"{path} is a folder; a run writes its record there. Move it away."])
    try:
        values = read_json_object(path)
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in values.items() if name not in _IS_OURS or _IS_OURS[name](value)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_lengths(value: object) -> bool:
    return isinstance(value, dict) and all(_is_number(value.get(name)) for name in ("max_steps", "num_train_epochs"))


#: Keys of run.json that a later run reads, and checks for their types.
_IS_OURS: dict[str, Callable[[object], bool]] = {
    "status": lambda value: isinstance(value, str),
    "start": lambda value: isinstance(value, str),
    "steps": _is_number,
    "lengths": _are_lengths,
    "records_held_out": lambda value: isinstance(value, list) and all(isinstance(origin, str) for origin in value),
}
