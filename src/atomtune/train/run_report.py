"""Run report: run.json and loss.png, what stays of a run."""

import platform
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from atomtune import __version__
from atomtune.disk import read_json_object, replacing, write_json
from atomtune.errors import BadSettings

RECORD = "run.json"
LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "safetensors")


class RunRecord:
    """run.json, kept true from the first moment: a reader finds `running` or how it ended."""

    def __init__(self, folder: Path, *, writes: bool = True, waits: bool = False) -> None:
        self.folder, self.writes, self.waits = folder, writes, waits
        self.values: dict[str, Any] = {
            "status": "running",
            "atomtune": __version__,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
            "machine": platform.machine(),
            "notices": [],
        }

    def update(self, **values: Any) -> None:
        self.values |= values
        self.values["updated"] = datetime.now(UTC).isoformat(timespec="seconds")
        if self.writes and not self.waits:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / RECORD, self.values)

    def begin(self) -> None:
        """From here on this run's record stands in the folder, in place of an earlier one."""
        self.waits = False
        self.update()


def draw_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Training and evaluation loss over steps, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.6, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per target token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    with replacing(path) as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)


def read_record(folder: Path) -> dict[str, Any]:
    """The folder's run.json; nothing where there is none or it cannot be read, and no value that is not what we write.

    Raises BadSettings where a folder has that name: the record of a run could not be written.
    """
    path = folder / RECORD
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


#: What a later run reads from a record, and how each looks when it is as we wrote it.
_IS_OURS: dict[str, Callable[[object], bool]] = {
    "status": lambda value: isinstance(value, str),
    "start": lambda value: isinstance(value, str),
    "steps": _is_number,
    "lengths": _are_lengths,
}
