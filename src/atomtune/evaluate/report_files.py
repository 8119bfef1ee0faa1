"""Report files: the folder of an evaluation's reports, and its report.json, report.md and report.html."""

import tempfile
from pathlib import Path

from atomtune.disk import read_json_object, why_unwritable, write_json, write_text
from atomtune.errors import BadSettings, RunFailed
from atomtune.evaluate.html_page import page
from atomtune.evaluate.report import Report, markdown
from atomtune.settings.command_settings import EvaluateSettings

#: Bytes that have to be free for the reports, which have about 20,000.
_ROOM_FOR_REPORTS = 2**20
#: Keys of report.json that are equal if one evaluation repeats another.
_IDENTITY = ("base", "adapters", "data", "data_sha256", "held_out", "records", "stopped_early", "settings")


def output_folder(settings: EvaluateSettings) -> Path:
    """The folder for the reports."""
    if settings.output_dir:
        return Path(settings.output_dir)
    return Path(settings.adapter_path[0]) / "evaluation" if settings.adapter_path else Path("evaluation")


def beside_others(folder: Path, report: Report) -> Path:
    """The first of evaluation, evaluation-1, … without the report of an evaluation that this one does not repeat.

    An evaluation takes hours: one of other records, models or settings does not replace it, unless --output_dir says
    so. Nor is a report of an older version replaced, which does not say what it was made from.
    """
    own = report.to_json()
    place, number = folder, 0
    while True:
        try:
            before = read_json_object(place / "report.json")
        except (OSError, ValueError):  # no report, or a broken one
            return place
        if all(before.get(key) == own[key] for key in _IDENTITY):
            return place
        number += 1
        place = folder.with_name(f"{folder.name}-{number}")


def refuse_unwritable(folder: Path) -> None:
    """Raise BadSettings if the reports cannot be written; else that would show only after all answers are generated."""
    if why := why_unwritable(folder, n_bytes=_ROOM_FOR_REPORTS):
        raise BadSettings([f"--output_dir {folder} cannot be written: {why}. Pass another one."])


def write_reports(report: Report, folder: Path) -> None:
    """report.json, report.md and report.html.

    Raises RunFailed if they cannot be written. They are then in a temporary folder, because an evaluation takes hours.
    """
    try:
        _write_reports(report, folder)
    except OSError as error:
        kept = Path(tempfile.mkdtemp(prefix="atomtune-reports-"))
        _write_reports(report, kept)
        raise RunFailed(
            f"--output_dir {folder}: the reports cannot be written there: {error.strerror}. They are in {kept} instead."
        ) from None


def _write_reports(report: Report, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", report.to_json())
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "report.html", page(report))
