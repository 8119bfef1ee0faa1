"""Settings file: settings as YAML for `atomtune train`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atomtune.disk import write_text

#: Words that need no quotes in YAML: numbers, paths and names.
_PLAIN = re.compile(r"[A-Za-z0-9/][A-Za-z0-9_./@+-]*")
_NOT_TEXT = ("null", "Null", "NULL")


def write_settings(path: Path, settings: Mapping[str, Any], *, comment: str) -> None:
    """Write `name: value` lines under a comment."""
    lines = [f"# {comment}", *(f"{name}: {_written(value)}" for name, value in settings.items())]
    write_text(path, "".join(f"{line}\n" for line in lines))


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_written(item) for item in value)}]"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and value not in _NOT_TEXT else json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)  # JSON is valid YAML
