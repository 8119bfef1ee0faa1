"""Raw records: a JSON value and its origin, not yet a Record; and why a text is not JSON.

Worker processes load this module, so it imports nothing heavy.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from atomtune.data.records import Refusal

#: Bytes. A longer line is refused without reading all of it, to bound memory: no record has a million words, and a line
#: of nothing but brackets becomes Python objects of 160 times its size.
LONGEST_LINE = 4 * 10**6


class RawRecord(NamedTuple):
    """A JSON value and its origin. A tuple: a million take 0.38 s to create, frozen dataclasses 0.57 s."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Lines:
    """Complete lines of a file, not parsed yet."""

    name: str
    first: int  # line number of the first, from 1
    raw: bytes


#: What is read at once: unparsed lines of JSONL, or finished values of any other kind of file.
Chunk = Lines | list[RawRecord | Refusal]


#: Depth of nested lists and objects. Pickling a record for another process takes two of Python's 1,000 stack frames per
#: level.
MOST_LEVELS = 200
#: Python's own message speaks of recursion.
TOO_DEEP = "lists or objects are nested too deeply"
NUL_BYTES = "it holds NUL bytes; the file is probably incomplete"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    """Raise ValueError for a number beyond those of Python; json makes it infinity, which JSON cannot hold."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:100]} is beyond the numbers that can be read")
    return number


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises ValueError for a repeated key, of which json silently keeps the last value."""
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        repeated = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"key {json.dumps(repeated[:100])} appears twice")
    return value


DECODER = json.JSONDecoder(
    object_pairs_hook=_object_without_repeats, parse_constant=_refuse_constant, parse_float=_finite
)


def refuse_deep(value: Any, brackets: int) -> None:
    """Raise ValueError if the value has more than MOST_LEVELS levels.

    brackets  opening brackets in its text: an upper bound of the depth, and quick to count
    """
    if brackets > MOST_LEVELS and is_deeper(value, MOST_LEVELS):
        raise ValueError(TOO_DEEP)


def is_deeper(value: object, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep. A loop, as recursion would fail on such values."""
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
    return any(isinstance(item, dict | list) for item in layer)


#: Messages of Python's JSON parser → ours; some exist only from Python 3.13 on.
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
#: Punctuation of a word processor or a Chinese keyboard, typed in place of JSON's.
_QUOTES, _FULL_WIDTH_MARKS = "“”„‘’", "，：｛｝［］"


def json_reason(error: json.JSONDecodeError) -> str:
    """Why a text is not JSON, for a message that has already named the place."""
    character = error.doc[error.pos : error.pos + 1]
    if character and character in _QUOTES:
        return 'a typographic quote; JSON allows only "'
    if character and character in _FULL_WIDTH_MARKS:
        return "a full-width mark; JSON allows only , : { } [ ]"
    if character == "'":
        return "it is written as Python prints it, in single quotes; write it with json.dumps"
    return _JSON_REASONS.get(error.msg, error.msg)


def encoding_reason(line: bytes, at: int) -> str:
    """Why a line that is not UTF-8 at byte `at` is refused, and how to fix the file."""
    reason = f"not UTF-8 at byte {at + 1}"
    try:
        line.decode("gb18030")
    except UnicodeDecodeError:
        return f"{reason}; save the file as UTF-8"
    return f"{reason}; it may be GBK: save it as UTF-8 in an editor, or run iconv -f GB18030 -t UTF-8 OLD > NEW"


def printable(text: object) -> str:
    """A text from the data for a message, with control characters and lone surrogates escaped."""
    word = str(text)
    if word.isprintable():
        return word
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in word
    )
