"""Run folder: which records a finished run was trained on and which it held out, from its run.json."""

from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import ValidationError

from atomtune.choices import RUN_RECORD
from atomtune.errors import BadData, BadModel
from atomtune.model.file_schemas import RunRecordFile
from atomtune.model.json_files import checked, refusal
from atomtune.settings.run_settings import RecordSettings


@dataclass(frozen=True)
class RunRecords:
    """The files of a run, how they were read, and the records that it was not trained on."""

    reading: RecordSettings
    eval_path: str | None
    held_out: frozenset[str]  # origins, as "train.jsonl:17"
    data_hash: str | None = None  # of the files that it was trained on
    eval_hash: str | None = None  # of the file of --eval_path
    like_trained_ones: frozenset[str] = frozenset()  # origins in that file


def run_file(folder: Path) -> tuple[Path, RunRecordFile] | None:
    """The run.json of a run's output folder, or of the run that a checkpoint belongs to; None if there is no such file.

    Raises BadModel if it is not of the form that a run writes.
    """
    for file in (folder / RUN_RECORD, folder.parent / RUN_RECORD):
        if file.exists():
            return file, checked(file, RunRecordFile)
    return None


def run_records(folder: Path) -> RunRecords | None:
    """How the run of this adapter read its records; None if there is no run.json, or one without settings."""
    run = run_file(folder)
    if run is None or run[1].settings is None:
        return None
    file, record = run
    known = {field.name for field in fields(RecordSettings)}
    values = {name: entry.value for name, entry in (record.settings or {}).items() if name in known}
    evaluation = (record.settings or {}).get("eval_path")
    eval_path = evaluation.value if evaluation else None
    if not isinstance(eval_path, str | None):
        raise BadModel(f"{file} cannot be used:\n  settings.eval_path.value: expected text")
    try:
        reading = RecordSettings(**values)
    except ValidationError as error:
        raise BadModel(refusal(file, values, error)) from None
    data_hash = record.data.sha256 if record.data else None
    return RunRecords(
        reading,
        eval_path,
        frozenset(record.records_held_out or ()),
        data_hash,
        record.evaluation.sha256 if record.evaluation else None,
        frozenset(record.eval_records_like_trained_ones or ()),
    )


def refuse_changed_files(folder: Path, data_hash: str) -> None:
    """Raise BadData if a run's files have changed since: a line may hold another record now."""
    run = run_file(folder)
    trained_on = run[1].data.sha256 if run and run[1].data else None
    if trained_on and trained_on != data_hash:
        raise BadData(
            f"The records that {folder} was trained on have changed since, so its held-out records are not known.\n"
            "Pass --dataset_path with records to evaluate on."
        )
