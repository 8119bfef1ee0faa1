"""Fields: readers for single values of a record; each returns the value with its problems and notes.

A reader returns a Field and does not change its arguments. A reader of several fields collects their problems, so that
one refusal reports all problems of a record.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

from atomtune.data.reading.raw import DECODER, TOO_DEEP, is_deeper, json_reason, printable
from atomtune.language import message

T = TypeVar("T")
Tool = Mapping[str, Any]

#: Maximum depth of nested lists and objects. Deeper ones are not a conversation, and would make a template that walks
#: them fail with a recursion error.
DEEPEST = 64
#: Maximum number of keys that a message or note lists: a record may have a hundred thousand.
KEYS_NAMED = 20
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_KINDS: dict[type, str] = {
    type(None): "null",
    bool: message("a boolean"),
    int: message("a number"),
    float: message("a number"),
    str: message("text"),
    list: message("a list"),
    dict: message("an object"),
    bytes: "bytes",
}


class Field(NamedTuple, Generic[T]):
    """A value that was read from a record."""

    value: T
    problems: tuple[str, ...] = ()  # any of them refuses the record
    notes: tuple[str, ...] = ()  # accepted, but worth reporting


_NO_TOOLS: Field[tuple[Tool, ...]] = Field(())


def read_text(value: object, place: str) -> Field[str]:
    """A text that can be encoded as UTF-8."""
    if not isinstance(value, str):
        return Field("", (f"{place} is {kind(value)}; expected text",))
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return Field(value, (f"{place} holds half a surrogate pair at character {error.start + 1}",))
    return Field(value)


def read_json(value: object, place: str) -> Field[Any]:
    """Parse a text as JSON, as needed for the cells of a table; any other value is returned unchanged."""
    if not isinstance(value, str):
        return Field(value)
    try:
        return Field(DECODER.decode(value))
    except RecursionError:
        return Field(None, (f"{place} cannot be read as JSON: {TOO_DEEP}",))
    except ValueError as error:
        reason = json_reason(error) if isinstance(error, json.JSONDecodeError) else str(error)
        return Field(None, (f"{place} is not JSON: {printable(reason)}",))


def read_plain(value: T, place: str) -> Field[T]:
    """A value that a template can write as JSON in UTF-8, nested at most DEEPEST levels."""
    if is_deeper(value, DEEPEST):
        return Field(value, (f"{place} holds lists or objects more than {DEEPEST} levels deep",))
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        return Field(value, (f"{place} holds half a surrogate pair",))
    except (TypeError, ValueError):
        return Field(value, (f"{place} holds a value that is not JSON",))
    return Field(value)


def read_tools(record: Mapping[str, Any]) -> Field[tuple[Tool, ...]]:
    """The record's `tools` (or the older `functions`), a list or its JSON text, in OpenAI's form.

    Both at once are a problem unless they list the same tools.
    """
    fields = [_read_list(record[key], key) for key in ("tools", "functions") if key in record]
    given = [field for field in fields if field.value or field.problems]
    if len(given) > 1 and given[0] != given[1]:
        problems = problems_of(given) or ("tools and functions list different tools; keep one of them",)
        return Field((), problems)
    return given[0] if given else _NO_TOOLS


def _read_list(value: object, key: str) -> Field[tuple[Tool, ...]]:
    if not value or (isinstance(value, str) and is_blank(value)):
        return _NO_TOOLS
    parsed = read_json(value, key)
    if parsed.problems:
        return Field((), parsed.problems)
    listed = [parsed.value] if isinstance(parsed.value, dict) else parsed.value
    if listed is None:
        return _NO_TOOLS
    if not isinstance(listed, list):
        return Field((), (f"{key} is {kind(listed)}; expected a list of tools",))
    fields = [_read_tool(tool, f"{key} {number}") for number, tool in enumerate(listed, 1)]
    return Field(tuple(field.value for field in fields), problems_of(fields))


def _read_tool(tool: object, place: str) -> Field[Tool]:
    if not isinstance(tool, dict):
        return Field({}, (f"{place} is {kind(tool)}; expected an object with a name",))
    function = tool.get("function") or tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        return Field({}, (f"{place} has no name",))
    if function is not tool:
        return read_plain(tool, place)
    # Anthropic calls `parameters` input_schema.
    function = {("parameters" if key == "input_schema" else key): value for key, value in tool.items()}
    return read_plain({"type": "function", "function": function}, place)


def missing_key(key: str, record: Mapping[str, Any], place: str = "") -> str:
    return f'{place}no key "{key}"; keys here: {keys_of(record)}'


def notes_on_unused(record: Mapping[str, Any], used: frozenset[str], of: str = "") -> tuple[str, ...]:
    """A note for each key that has a value but is not used by the format."""
    if record.keys() <= used:
        return ()
    unused = [key for key in record if key not in used and record[key] not in _EMPTY]
    return tuple(f'key "{printable(key)}"{of} is not used by this format' for key in unused[:KEYS_NAMED])


def problems_of(fields: Iterable[Field[Any]]) -> tuple[str, ...]:
    return tuple(problem for field in fields for problem in field.problems)


def is_blank(text: str) -> bool:
    return not text or text.isspace()


def is_empty(value: object) -> bool:
    return value in _EMPTY


def keys_of(record: Mapping[str, Any]) -> str:
    """The keys of a record for a message: the first KEYS_NAMED and the number of others."""
    named = ", ".join(printable(key) for key in islice(record, KEYS_NAMED))
    rest = len(record) - KEYS_NAMED
    if rest > 0:
        return f"{named} and {rest:,} more"
    return named or "none"


def kind(value: object) -> str:
    """The name of the value's JSON type, for messages."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")
