"""Dataset info: LLaMA-Factory's `dataset_info.json`, which describes the format of the files in its folder.

{"mine": {"file_name": "mine.json", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": {…}}}
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atomtune.choices import FormatName
from atomtune.errors import BadData

FILE_NAME = "dataset_info.json"
#: LLaMA-Factory's formats, columns and tags → ours.
_FORMATS: dict[str, FormatName] = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "sharegpt"}
_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "history": "history",
    "tools": "tools",
    "messages": "conversations",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "kto_tag",
    "images": "images",
    "videos": "videos",
    "audios": "audios",
}
_KEY_TAGS = {"role_tag": "from", "content_tag": "value"}
_ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
#: Key names that are read without a mapping.
_READ_ANYWAY = {"from": ("from", "role"), "value": ("value", "content")}


@dataclass(frozen=True)
class ListedFile:
    """A data file, with its format, keys and roles if dataset_info.json gives them."""

    path: Path
    format: FormatName | None = None
    keys: Mapping[str, str] = field(default_factory=dict)  # the file's key → ours
    roles: Mapping[str, str] = field(default_factory=dict)


def listed_files(folder: Path) -> list[ListedFile] | None:
    """The files that the folder's dataset_info.json lists, in its order; None if the folder has none.

    Entries for data sets on a hub list no file and are skipped (`unread_entries`): nothing is downloaded unless the
    user asks for it.
    Raises BadData if dataset_info.json cannot be read or a listed file is not there.
    """
    entries = _entries(folder / FILE_NAME)
    if entries is None:
        return None
    files = [_listed(folder, name, entry) for name, entry in entries.items() if _names_file(entry)]
    if not files:
        raise BadData(f"{folder / FILE_NAME}: it names no file in this folder. Pass the data files themselves.")
    return files


def unread_entries(folder: Path) -> list[str]:
    """The entries of the folder's dataset_info.json that name no file in it, such as data sets on a hub."""
    entries = _entries(folder / FILE_NAME) or {}
    return [name for name, entry in entries.items() if not _names_file(entry)]


def _names_file(entry: Mapping[str, Any]) -> bool:
    return isinstance(entry.get("file_name"), str)


def _entries(path: Path) -> dict[str, dict[str, Any]] | None:
    """The entries of LLaMA-Factory's dataset_info.json; None for the file that `datasets` writes under this name."""
    if not path.is_file():
        return None
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadData(f"{path}: cannot be read: {error}.") from None
    if not isinstance(description, dict) or not description:
        return None
    entries = list(description.values())
    if not all(isinstance(entry, dict) for entry in entries) or not any("file_name" in entry for entry in entries):
        return None
    return description


def _listed(folder: Path, name: str, entry: dict[str, Any]) -> ListedFile:
    path = folder / entry["file_name"]
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except ValueError:  # a NUL or a lone surrogate, which no file name can contain
        inside = True
    what = ""
    if not inside:
        what = "not in this folder"
    elif any(part.startswith(".") for part in Path(entry["file_name"]).parts):
        what = "hidden, and so not read"
    elif not path.is_file():
        what = "not there"
    if what:
        raise BadData(f'{folder / FILE_NAME}: the file "{entry["file_name"]}" of "{name}" is {what}.')
    formatting = entry.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise BadData(f'{folder / FILE_NAME}: formatting "{formatting}" of "{name}"; expected one of {known}.')
    columns, tags = _texts(entry.get("columns")), _texts(entry.get("tags"))
    keys: dict[str, str] = {}
    for theirs, ours in _COLUMNS.items():
        if theirs in columns and columns[theirs] != ours:
            keys[columns[theirs]] = ours
    for tag, ours in _KEY_TAGS.items():
        if tag in tags and tags[tag] not in _READ_ANYWAY[ours]:
            keys[tags[tag]] = ours
    roles = {tags[tag]: ours for tag, ours in _ROLE_TAGS.items() if tag in tags}
    return ListedFile(path, _FORMATS[formatting], keys, roles)


def _texts(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    return {key: text for key, text in value.items() if isinstance(text, str)}
