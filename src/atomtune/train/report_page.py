"""Report page: a finished run as one HTML file that opens from disk, loads nothing and runs no script.

All its content is in run.json, except the picture of the loss. Texts of records are escaped.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from atomtune.disk import write_text
from atomtune.durations import duration
from atomtune.language import message
from atomtune.pages import rendered
from atomtune.settings.entry import DEFAULT
from atomtune.train.run_report import PICTURE

PAGE = "report.html"
#: (setting, value, where the value came from).
Row = tuple[str, str, str]


def write_page(record: Mapping[str, Any], folder: Path, *, title: str, commands: Sequence[str]) -> None:
    """Write report.html to the run's folder, where the picture of the loss is; record is the content of run.json."""
    image = base64.b64encode((folder / PICTURE).read_bytes()).decode()
    write_text(folder / PAGE, page(record, title=title, image=image, commands=commands))


def page(record: Mapping[str, Any], *, title: str, image: str, commands: Sequence[str]) -> str:
    """The run as HTML; image is the PNG in base64."""
    rows = [(name, shown(entry["value"]), entry["source"]) for name, entry in record["settings"].items()]
    return rendered(
        "train",
        "report.html.jinja",
        run=record,
        title=title,
        base=shown(record["settings"]["model_path"]["value"]),
        picture=image,
        started=str(record["started"])[:16].replace("T", " "),
        ledger=list(_ledger(record)),
        work=list(_work(record)),
        settings=[row for row in rows if row[2] != DEFAULT],
        defaults=[row for row in rows if row[2] == DEFAULT],
        commands=commands,
    )


def shown(value: Any) -> str:
    """A setting's value as a user would write it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(str, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ledger(record: Mapping[str, Any]) -> Iterator[Row]:
    """What became of every record and token."""
    refused, held_out = record.get("records_refused") or [], record.get("records_held_out") or []
    yield "records read", f"{record['records_read']:,}", str(record.get("format", ""))
    yield message("used"), f"{record['records_used']:,}", ""
    yield message("refused"), f"{len(refused):,}", "the reasons are in run.json" if refused else ""
    yield message("shortened"), f"{record.get('records_cut', 0):,}", "their prompts, never their answers"
    if held_out:
        yield "held out", f"{len(held_out):,}", "of the used; evaluated on, not trained on"
    yield "prompt tokens", f"{record['prompt_tokens']:,}", message("read")
    yield "target tokens", f"{record['target_tokens']:,}", message("learned")


def _work(record: Mapping[str, Any]) -> Iterator[Row]:
    """What was computed, how fast, and what padded batches would have needed."""
    computed, padded = record["tokens_computed"], record["tokens_padded"]
    if computed:
        yield "tokens computed", f"{computed:,}", f"layout {record.get('layout', '')}"
        note = f"{padded / computed:.1f} times as many if every record were padded to the longest"
        yield "tokens of padded batches", f"{padded:,}", note
    if record["seconds"]:
        yield message("time"), duration(record["seconds"]), f"{record['examples_per_second']:.1f} examples a second"
    yield message("memory"), decimal(record["peak_memory_bytes"]), "at the peak"
