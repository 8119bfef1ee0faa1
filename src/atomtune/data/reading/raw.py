"""Raw records: a JSON value and the place it stands at, not yet a Record.

Nothing heavy is imported here: worker processes load this module.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from atomtune.data.records import Refusal

#: A longer line is refused without being read whole: a million words are no record, and memory stays bounded. A line of
#: nothing but brackets becomes Python objects of 160 times its bytes.
LONGEST_LINE = 4 * 10**6


class RawRecord(NamedTuple):
    """A JSON value and where it stands. A tuple: a million frozen dataclasses take 0.57 s to make, these 0.38 s."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Lines:
    """Whole lines of a file, not parsed yet."""

    name: str
    first: int  # number of the first line
    raw: bytes


#: What is read in one go: lines to be parsed, or what other kinds of file give, ready.
Chunk = Lines | list[RawRecord | Refusal]


#: Lists and objects that stand in each other: records of more levels cannot be handed to other processes, which takes
#: two of Python's thousand steps a level.
MOST_LEVELS = 200
#: Python's own words for it speak of recursion.
TOO_DEEP = "lists or objects are nested too deeply"
NUL_BYTES = "it holds NUL bytes; the file is probably incomplete"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that appears twice, json would keep the last in silence."""
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        repeated = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"key {json.dumps(repeated[:100])} appears twice")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object_without_repeats, parse_constant=_refuse_constant)


def refuse_deep(value: Any, brackets: int) -> None:
    """Raise ValueError for a value of too many levels. brackets: how many open in its text, which is seen at once."""
    if brackets > MOST_LEVELS and is_deeper(value, MOST_LEVELS):
        raise ValueError(TOO_DEEP)


def is_deeper(value: object, levels: int) -> bool:
    """Whether lists and objects stand in each other more often than this.

    A loop, since a recursion is what it protects from.
    """
    layer = [value]
    for _ in range(levels):
        inner: list[object] = []
        for item in layer:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        if not inner:
            return False
        layer = inner
    return any(isinstance(item, dict | list) and item for item in layer)


#: What Python's reader of JSON says → what a person is told; some of it only from Python 3.13 on.
_JSON_REASONS = {
    "Expecting value": "a value is expected here",
    "Expecting property name enclosed in double quotes": "a key in double quotes is expected here",
    "Expecting ':' delimiter": "a colon is expected here",
    "Expecting ',' delimiter": "a comma or a closing bracket is expected here",
    "Unterminated string starting at": "the text that begins here has no closing quote",
    "Invalid control character at": "a control character in a text; write a tab as \\t, a line end as \\n",
    "Invalid \\escape": "a backslash that escapes nothing; write two of them",
    "Invalid \\uXXXX escape": "\\u without four hexadecimal digits after it",
    "Extra data": "text after the end of the value",
    "Illegal trailing comma before end of object": "a comma before the closing bracket",
    "Illegal trailing comma before end of array": "a comma before the closing bracket",
}
#: Marks of a word processor or a Chinese keyboard where JSON has its own.
_QUOTES, _FULL_WIDTH_MARKS = "“”„‘’", "，：｛｝［］"


def json_reason(error: json.JSONDecodeError) -> str:
    """Why a text is no JSON, behind its place."""
    character = error.doc[error.pos : error.pos + 1]
    if character and character in _QUOTES:
        return 'a typographic quote; JSON allows only "'
    if character and character in _FULL_WIDTH_MARKS:
        return "a full-width mark; JSON allows only , : { } [ ]"
    if character == "'" or error.doc.lstrip().startswith(("{'", "[{'", "['")):
        return "it is written as Python prints it, in single quotes; write it with json.dumps"
    return _JSON_REASONS.get(error.msg, error.msg)


def encoding_reason(line: bytes, at: int) -> str:
    """Why a line is refused that is not UTF-8 at byte `at`, and what mends it."""
    reason = f"not UTF-8 at byte {at + 1}"
    try:
        line.decode("gb18030")
    except UnicodeDecodeError:
        return f"{reason}; save the file as UTF-8"
    return f"{reason}; it may be GBK: save it as UTF-8 in an editor, or run iconv -f GB18030 -t UTF-8 OLD > NEW"


def printable(text: object) -> str:
    """A word from the data as a message can show it: control characters and halves of surrogate pairs are escaped."""
    word = str(text)
    if word.isprintable():
        return word
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in word
    )
