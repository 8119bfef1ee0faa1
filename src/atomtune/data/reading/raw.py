"""Raw records: a JSON value and the place it stands at, not yet a Record.

Nothing heavy is imported here: worker processes load this module.
"""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from atomtune.data.records import Refusal

#: A longer line is refused without being read whole: two million words are no record, and memory stays bounded.
LONGEST_LINE = 16 * 2**20


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


NUL_BYTES = "it holds NUL bytes, as a file does that was not written to its end"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON value")


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that stands twice, json would keep the last in silence."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'key "{next(key for key in keys if keys.count(key) > 1)}" stands twice')
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object_without_repeats, parse_constant=_refuse_constant)


def encoding_reason(line: bytes, at: int) -> str:
    """Why a line is refused that is not UTF-8 at byte `at`, and what mends it."""
    reason = f"not UTF-8 at byte {at + 1}"
    try:
        line.decode("gb18030")
    except UnicodeDecodeError:
        return f"{reason}; save the file as UTF-8"
    return f"{reason}; it may be GBK: iconv -f GB18030 -t UTF-8 OLD > NEW"
