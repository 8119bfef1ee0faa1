"""Run folder: which records a finished run was trained on and which it held out, as its run.json says."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from atomtune.errors import BadData
from atomtune.settings.fields import RecordSettings


@dataclass(frozen=True)
class RunRecords:
    """The files of a run, how they were read, and the records it did not learn."""

    reading: RecordSettings
    eval_path: str | None
    held_out: frozenset[str]  # origins, as "train.jsonl:17"


def run_json(folder: Path) -> dict[str, Any]:
    """The run.json of a run's output folder, or of the run that a checkpoint lies in; {} where there is none."""
    for place in (folder, folder.parent):
        try:
            values = json.loads((place / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(values, dict):
            return values
    return {}


def run_records(folder: Path) -> RunRecords | None:
    """How the run of this adapter read its records; None for an adapter that no run of ours wrote."""
    run = run_json(folder)
    settings = run.get("settings")
    if not isinstance(settings, dict):
        return None
    values = {name: entry["value"] for name, entry in settings.items()}
    known = {field.name for field in fields(RecordSettings)}
    reading = RecordSettings(**{name: value for name, value in values.items() if name in known})
    return RunRecords(reading, values.get("eval_path"), frozenset(run.get("records_held_out", ())))


def refuse_changed_files(folder: Path, data_hash: str) -> None:
    """Raise BadData when a run's files are not those it read: a record's line may be another record now."""
    trained_on = run_json(folder).get("data", {}).get("sha256")
    if trained_on and trained_on != data_hash:
        raise BadData(
            f"The records that {folder} was trained on have changed since, so its held-out records are not known.\n"
            "Pass --dataset_path with records to evaluate on."
        )
