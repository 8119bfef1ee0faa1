"""Runs: lists the runs in a folder, and compares two or more of them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from atomtune.choices import EXPORTED_FOR, RUN_RECORD
from atomtune.console import WIDE, Console, print_json
from atomtune.data.reading.raw import printable
from atomtune.errors import BadModel, BadSettings
from atomtune.folders import was_left
from atomtune.language import message, translated
from atomtune.model.file_schemas import RunRecordFile
from atomtune.model.json_files import checked
from atomtune.pages import label, picture
from atomtune.settings.command_settings import RunsSettings

#: How many levels below the folder runs are searched: runs/day/name.
DEPTH = 3
#: Line width in a pipe, more than any row needs.
PIPE = 10_000
#: Number of rows in the table of losses.
STEPS_SHOWN = 8
#: Valid suffixes of a picture's file.
PLOTS = (".png", ".pdf", ".svg", ".jpg")
#: Settings with paths and names of runs, which always differ.
PLACES = ("output_dir", "logging_dir", "run_name")


@dataclass(frozen=True)
class Run:
    """A run's folder and the content of its run.json."""

    folder: Path
    values: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> "Run":
        """Read a run. Raises BadModel if run.json is invalid."""
        return cls(folder, checked(folder / RUN_RECORD, RunRecordFile).model_dump())

    @property
    def status(self) -> str:
        """The run's status; a killed run still has `running` in its file."""
        status = str(self.values.get("status", "?"))
        return message("killed") if status == "running" and was_left(self.folder) else status

    @property
    def losses(self) -> dict[int, float | None]:
        """step → training loss."""
        return {entry["step"]: entry["loss"] for entry in self.values["loss_history"] or []}

    @property
    def held_out(self) -> dict[int, float | None]:
        """step → held-out loss."""
        return {entry["step"]: entry["loss"] for entry in self.values["eval_history"] or []}

    @property
    def settings(self) -> dict[str, Any]:
        return {name: entry["value"] for name, entry in (self.values["settings"] or {}).items()}

    @property
    def held_out_text(self) -> str:
        """Its held-out loss, with the step if that is not the kept adapter's."""
        step, text = self.values["eval_step"], _text(self.values.get("eval_loss"))
        kept_step = (self.values["outcome"] or {}).get("kept_step")
        return text if step in (None, kept_step) else translated(f"{text} at step {step:,}")

    def summary(self) -> dict[str, Any]:
        """The figures of a run in the list."""
        data = self.settings.get("dataset_path") or []
        paths = data if isinstance(data, list) else [data]
        return {
            "folder": str(self.folder),
            "status": self.status,
            "data": ", ".join(Path(str(path)).name for path in paths),
            "records": self.values.get("records_used"),
            "steps": self.values.get("steps"),
            "train_loss": self.values.get("train_loss"),
            "eval_loss": self.values.get("eval_loss"),
            "eval_step": self.values["eval_step"],
            "started": self.values.get("started", ""),
        }


def runs(settings: RunsSettings) -> int:
    """Run `atomtune runs`: list the runs in a folder, or compare several runs."""
    folders = [Path(folder) for folder in settings.folder]
    console = Console(stderr=settings.json)
    if settings.plot and Path(settings.plot).suffix.lower() not in PLOTS:
        raise BadSettings([f"--plot {settings.plot}: expected a file that ends in {', '.join(PLOTS)}."])
    if len(folders) > 1:
        _compare([_run_in(folder) for folder in folders], settings, console)
        return 0
    if settings.plot:
        raise BadSettings(["--plot draws the runs that are compared. Name two or more: atomtune runs A B."])
    _list(folders[0], settings, console)
    return 0


def _run_in(folder: Path) -> Run:
    if not (folder / RUN_RECORD).exists():
        raise BadSettings([f"{folder / RUN_RECORD}: no such file. Pass the output folder of a run."])
    return Run.of(folder)


def find_runs(folder: Path, *, notice: Callable[[str], None]) -> list[Run]:
    """The runs in a folder and below it, the oldest first; an invalid run.json gets a notice.

    A copy that `export --to peft` made has its run's run.json, and is left out.
    """
    runs: list[Run] = []
    for file in _records_below(folder, DEPTH):
        try:
            run = Run.of(file.parent)
        except (BadModel, OSError) as error:
            notice(f"a run is not listed: {error}")
            continue
        if run.values.get(EXPORTED_FOR) is None:
            runs.append(run)
    return sorted(runs, key=lambda run: (str(run.values.get("started", "")), str(run.folder)))


def _records_below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / RUN_RECORD).is_file():
        yield folder / RUN_RECORD
        return  # subfolders of a run are its checkpoints
    if depth == 0:
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
            try:
                yield from _records_below(child, depth - 1)
            except OSError:  # not readable, or removed meanwhile
                continue


def _list(folder: Path, settings: RunsSettings, console: Console) -> None:
    if not folder.is_dir():
        raise BadSettings([f"{folder}: no such folder."])
    found = find_runs(folder, notice=console.notice)
    if settings.json:
        print_json([run.summary() for run in found])
        return
    if not found:
        console.say(f"No runs in {folder}. `atomtune train` writes {RUN_RECORD} into its --output_dir.")
        return
    table = _table(
        console, *map(translated, ("run", "status", "data", "records", "steps", "mean loss", "held out", "started"))
    )
    for run in found:
        summary = run.summary()
        table.add_row(
            _below(run.folder, folder),
            translated(run.status),
            *(_text(summary[name]) for name in ("data", "records", "steps", "train_loss")),
            run.held_out_text,
            str(summary["started"])[:16].replace("T", " "),
        )
    _print(table, console)


def _table(console: Console, *heads: str) -> Table:
    """A table in which long names continue in the next line; by default rich cuts them, and they cannot be copied."""
    gap = 2 if console.width >= WIDE else 1
    columns = [Column(head, overflow="fold") for head in heads]
    return Table(*columns, box=None, pad_edge=False, padding=(0, gap, 0, 0))


def _print(table: Table, console: Console) -> None:
    """Print a table in the terminal's width; in a pipe each row is one line, for grep and similar tools."""
    width = console.width
    if not console.is_terminal:
        console.width = PIPE
    console.print(table)
    console.width = width


def _below(folder: Path, top: Path) -> str:
    relative = folder.relative_to(top)
    return str(relative) if relative.parts else str(top)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _compare(compared: Sequence[Run], settings: RunsSettings, console: Console) -> None:
    differing = differing_settings(compared)
    if settings.plot:
        _draw(compared, Path(settings.plot))
    if settings.json:
        print_json({"settings": differing, "runs": [run.summary() for run in compared]})
        return
    names = [str(run.folder) for run in compared]
    table = _table(console, translated("setting"), *names)
    for name, values in differing.items():
        # A setting that a run did not set has its default, which may equal the value that another run set.
        is_set = [name in run.settings for run in compared]
        table.add_row(
            name, *(_text(value) if told else translated("default") for value, told in zip(values, is_set, strict=True))
        )
    if differing:
        _print(table, console)
    else:
        console.say("All settings are the same.")
    figures = _table(console, translated("figure"), *names)
    figures.add_row("status", *(translated(run.status) for run in compared))
    for name in ("records_used", "steps", "train_loss"):
        figures.add_row(name, *(_text(run.values.get(name)) for run in compared))
    figures.add_row("eval_loss", *(run.held_out_text for run in compared))
    for name in ("seconds", "examples_per_second"):
        figures.add_row(name, *(_text(run.values.get(name)) for run in compared))
    console.say("")
    _print(figures, console)
    _say_losses("loss at step", [run.losses for run in compared], names, console)
    _say_losses("held-out loss at step", [run.held_out for run in compared], names, console)
    if settings.plot:
        console.say(translated(f"\nwritten: {settings.plot}"))


def differing_settings(compared: Sequence[Run]) -> dict[str, list[Any]]:
    """setting → its value in each run, for the settings that differ."""
    names = sorted(set().union(*(run.settings for run in compared)))
    rows = {name: [run.settings.get(name) for run in compared] for name in names if name not in PLACES}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def _say_losses(
    title: str, losses: Sequence[Mapping[int, float | None]], names: Sequence[str], console: Console
) -> None:
    """Print the losses of all runs at some of their steps; nothing if there are none."""
    steps = sorted(set().union(*losses))
    if not steps:
        return
    *before, last = steps
    every = max(len(steps) // STEPS_SHOWN, 1)
    # Runs of different lengths log at different steps: of each stretch, a step that most of them have.
    stretches = [before[start : start + every] for start in range(0, len(before), every)]
    shown = [max(stretch, key=lambda step: sum(step in of_run for of_run in losses)) for stretch in stretches]
    shown.append(last)
    table = _table(console, translated(title), *names)
    for step in shown:
        table.add_row(f"{step:,}", *(_text(of_run.get(step)) for of_run in losses))
    console.say("")
    _print(table, console)


def _draw(compared: Sequence[Run], path: Path) -> None:
    try:
        draw(compared, path)
    except OSError as error:
        raise BadSettings([f"--plot {path}: cannot be written there: {error.strerror}. Use another path."]) from None


def draw(compared: Sequence[Run], path: Path) -> None:
    """Draw the training and held-out losses of all runs in one picture; a run's two lines have the same colour."""
    with picture(path, loss=message("loss per token (nats)")) as axes:
        for number, run in enumerate(compared):
            colour, name = f"C{number % 10}", printable(run.folder)
            axes.plot(list(run.losses), _with_gaps(run.losses), color=colour, label=name)
            if run.held_out:
                held_out = label(f"{name}, held out")
                axes.plot(
                    list(run.held_out), _with_gaps(run.held_out), "o--", color=colour, markersize=4, label=held_out
                )


def _with_gaps(losses: Mapping[int, float | None]) -> list[float]:
    """The losses as a line; values that were not finite become gaps."""
    return [math.nan if loss is None else loss for loss in losses.values()]
