"""Earlier run: settings that `--resume` takes from the run's run.json if the command names no model or no data.

So `atomtune train --resume --output_dir FOLDER` continues a killed run even if its command is not known.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from atomtune.choices import RUN_RECORD
from atomtune.disk import read_json_object
from atomtune.errors import BadSettings
from atomtune.settings.declare import is_secret
from atomtune.settings.entry import DEFAULT, FOUND, OF_THE_DEMO, OWN_DEFAULT, Entry

#: Sources of values that the run chose itself, and finds again; the demo sets its own.
_LEFT_TO_THE_RUN = (DEFAULT, OWN_DEFAULT, OF_THE_DEMO)
#: Settings that must be given each time: how a run starts, and whether code that comes with a model may run.
_SAID_EACH_TIME = (
    *("resume", "resume_from_checkpoint", "resume_anyway", "continue_training", "checkpoint"),
    *("output_dir", "trust_remote_code"),
)


def entries_of_earlier_run(entries: Mapping[str, Entry], known: Mapping[str, Any]) -> dict[str, Entry]:
    """The settings of the run to resume, if these entries ask for a resume and lack a model or data; else empty.

    known  all settings by name
    Raises BadSettings if the folder's run.json has no settings: without model and data, the demo would start instead.
    """
    named = {"model_path", "dataset_path"} & entries.keys()
    if len(named) == 2 or "output_dir" not in entries or not _is_on(entries.get("resume")):
        return {}
    file = Path(str(entries["output_dir"].value)) / RUN_RECORD
    try:
        recorded = read_json_object(file).get("settings")
    except (OSError, ValueError):
        recorded = None
    if not isinstance(recorded, dict):
        if named:  # the missing one is reported elsewhere
            return {}
        raise BadSettings(
            [
                f"--resume: no settings of a run in {file}. Pass the --output_dir of the run, or the command that "
                "started it, with --model_path and --dataset_path."
            ]
        )
    return {
        name: Entry(setting["value"], str(file))
        for name, setting in recorded.items()
        if name in known and isinstance(setting, dict) and "value" in setting and _was_set(name, setting.get("source"))
    }


def _is_on(entry: Entry | None) -> bool:
    with contextlib.suppress(ValidationError):  # reported elsewhere
        return entry is not None and TypeAdapter(bool).validate_python(entry.value)
    return False


def _was_set(name: str, source: object) -> bool:
    if name in _SAID_EACH_TIME or is_secret(name) or not isinstance(source, str):
        return False
    return source not in _LEFT_TO_THE_RUN and source.partition(":")[0] != FOUND
