"""Earlier run: settings that `--resume` takes from the run's own record where the command names no model or no data.

So `atomtune train --resume --output_dir FOLDER` goes on with a run that was killed, whose command nobody printed.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from atomtune.choices import RUN_RECORD
from atomtune.disk import read_json_object
from atomtune.errors import BadSettings
from atomtune.settings.entry import DEFAULT, FOUND, OF_THE_DEMO, OWN_DEFAULT, Entry
from atomtune.settings.fields import is_secret

#: Sources of values that were left to the run, which finds them again; what the demo sets, it sets itself.
_LEFT_TO_THE_RUN = (DEFAULT, OWN_DEFAULT, OF_THE_DEMO)
#: What is said each time: where a run begins, and whether code that comes with a model may run.
_SAID_EACH_TIME = (
    *("resume", "resume_from_checkpoint", "resume_anyway", "continue_training", "checkpoint"),
    *("output_dir", "trust_remote_code"),
)


def entries_of_earlier_run(entries: Mapping[str, Entry], known: Mapping[str, Any]) -> dict[str, Entry]:
    """What was set in the run to resume, where these entries ask for that and name no model or no data; else nothing.

    known  the settings there are, by name
    Raises BadSettings where the folder's record has none: without a model and data it would be the demo that begins.
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
        if named:  # the other one is missing, which is said elsewhere
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
    with contextlib.suppress(ValidationError):  # which is said elsewhere
        return entry is not None and TypeAdapter(bool).validate_python(entry.value)
    return False


def _was_set(name: str, source: object) -> bool:
    if name in _SAID_EACH_TIME or is_secret(name) or not isinstance(source, str):
        return False
    return source not in _LEFT_TO_THE_RUN and source.partition(":")[0] != FOUND
