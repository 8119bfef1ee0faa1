"""JSON files: files beside weights, read and checked against a schema before a library sees them.

On `"hidden_size": "32"`, or a list in place of an object, a library fails somewhere inside itself or hangs. Here the
message names the file, the value found and the value expected.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from atomtune.choices import RUN_RECORD
from atomtune.data.reading.raw import json_reason
from atomtune.disk import LFS_POINTER, read_json_object
from atomtune.errors import BadModel, listing
from atomtune.language import message

#: No such file is larger: the largest known index of weights has 15 MB, a tokenizer of 260,000 tokens 33 MB.
MOST_BYTES = 2**27
#: The limit for smaller files, which are read more than once; the largest known, a tokenizer_config.json, has under 2
#: MB.
_MOST_BYTES_OF_SETTINGS = 2**24
#: Files that may be large. A run of a million steps logs 20 MB, and 100,000 refused records take as much.
_LARGE = ("tokenizer.json", ".index.json", "trainer_state.json", RUN_RECORD)
#: Suffixes of model, tokenizer and adapter files that libraries search for and open by themselves.
_OPENED = (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin", ".pt", ".py")
_SHOWN_CHARACTERS = 60
_SHOWN_PROBLEMS = 8

#: pydantic's type of error → what was expected; its limits are in the error's context.
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
    "missing": message("a value"),
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "less than {lt}",
    "string_pattern_mismatch": message("a name"),
    "string_too_long": "at most {max_length} characters",
    "literal_error": "{expected}",
    "enum": "{expected}",
}

Shape = TypeVar("Shape", bound="JsonFile")


class JsonFile(BaseModel):
    """A JSON object with some known keys. Types are strict (text is not a number); unknown keys are kept."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())


def checked(file: Path, shape: type[Shape]) -> Shape:
    """The content of a file. Raises BadModel if it does not fit the schema."""
    values = json_object(file)
    try:
        return shape.model_validate(values)
    except ValidationError as error:
        raise BadModel(refusal(file, values, error)) from None


def json_object(file: Path) -> dict[str, Any]:
    """A file's JSON object. Raises BadModel if the file holds anything else."""
    refuse_unreadable(file)
    try:
        return read_json_object(file)
    except json.JSONDecodeError as error:
        reason = message(f"not JSON at line {error.lineno}, column {error.colno}: {json_reason(error)}")
    except (OSError, ValueError) as error:
        reason = str(error)[:200]
    raise BadModel(
        f"{file} cannot be read: {reason}. Expected a JSON object.\n"
        "It may be incomplete: copy the folder again, or use another one."
    )


def refuse_unreadable(file: Path) -> None:
    """Raise BadModel if the file is missing, empty, too large, or a git-lfs pointer."""
    if not file.is_file():
        raise BadModel(f"{file} is not a file. Copy the folder again.")
    size = file.stat().st_size
    if size == 0:
        raise BadModel(f"{file} is empty; expected a JSON object. Copy the folder again.")
    most = MOST_BYTES if file.name.endswith(_LARGE) else _MOST_BYTES_OF_SETTINGS
    if size > most:
        raise BadModel(f"{file} has {size:,} bytes; such a file may have at most {most:,}.")
    if is_lfs_pointer(file):
        raise BadModel(
            f"{file} is a git-lfs pointer, not the file itself.\n"
            f"Fetch the files: git lfs install && git -C {quote(str(file.parent))} lfs pull"
        )


def refuse_no_files(folder: Path) -> None:
    """Raise BadModel if a path with the suffix of a model file is a pipe, a folder or a broken link, or is unreadable.

    A library would wait for a pipe forever, and treat a broken link or an unreadable file as missing. A copied folder
    whose links are broken would then be trained with another chat template.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix not in _OPENED:
            continue
        if path.is_file():
            if not os.access(path, os.R_OK):  # safetensors would say that there is no such file
                raise BadModel(
                    f"{path} cannot be read by this user. Ask its owner for `chmod a+r`, or copy the folder."
                )
            continue
        if path.is_dir():
            if path.suffix not in (".json", ".jinja"):
                continue
            kind = message("a folder")
        else:
            kind = message("a broken link") if path.is_symlink() else message("a pipe or a device")
        raise BadModel(f"{path} is {kind}, not a file. Copy the folder again, with the files that its links lead to.")


def is_lfs_pointer(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def refusal(file: Path, values: Mapping[str, Any], error: ValidationError) -> str:
    """What is wrong in a file, one line per key: what was found, and what was expected."""
    expected: dict[str, list[str]] = {}  # place → all values that would be valid
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        place, value = _place_of(values, problem["loc"])
        template = _EXPECTED.get(problem["type"])
        # A message of pydantic may contain braces of the file's own, so it is not a template.
        words = template.format(**problem.get("ctx", {})) if template else problem["msg"]
        if words not in expected.setdefault(place, []):
            expected[place].append(words)
        found[place] = message("no value") if problem["type"] == "missing" else _shown(value)
    lines = [f"  {place}: found {found[place]}, expected {' or '.join(words)}" for place, words in expected.items()]
    return f"{file} cannot be used:\n{listing(lines, _SHOWN_PROBLEMS)}"


def _place_of(values: Any, loc: Sequence[int | str]) -> tuple[str, Any]:
    """Where a problem is, for example `text_config.layer_types[3]`, and the value there.

    After the place, pydantic names members of a union, which are not keys of the file; these are skipped.
    """
    place = ""
    for part in loc:
        if isinstance(part, int) and isinstance(values, list) and part < len(values):
            values, place = values[part], f"{place}[{part}]"
        elif isinstance(part, str) and isinstance(values, Mapping):
            place = f"{place}.{part}" if place else part
            if part not in values:  # missing
                break
            values = values[part]
    return place, values


def _shown(value: Any) -> str:
    if isinstance(value, list | Mapping):
        kind, number = message("a list") if isinstance(value, list) else message("an object"), len(value)
        return f"{kind} of {number:,}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
