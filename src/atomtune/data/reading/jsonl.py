"""JSONL: one JSON value a line, cut into chunks cheaply and parsed wherever there is a free core.

Before: packed.py gives the file's bytes.  After: formats.py turns each value into a Record.
Strictly UTF-8; a BOM and CRLF are fine. Nothing heavy is imported here: worker processes load this module.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from atomtune.data.records import Refusal

#: A longer line is refused without being read whole: two million words are no record, and memory stays bounded.
LONGEST_LINE = 16 * 2**20
#: What goes to a worker at once: some 1,500 short records.
CHUNK_BYTES = 256 * 2**10


class Found(NamedTuple):
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
Chunk = Lines | list[Found | Refusal]


def read_chunks(stream: BinaryIO, name: str) -> Iterator[Chunk]:
    """Cut a stream into chunks of whole lines; a line beyond LONGEST_LINE is a refusal between them."""
    first = 1
    while raw := stream.read(CHUNK_BYTES):
        start = raw.rfind(b"\n") + 1  # of the line that the chunk ends in
        if start < len(raw):
            raw += stream.readline(LONGEST_LINE - (len(raw) - start))
        if len(raw) - start == LONGEST_LINE and not raw.endswith(b"\n"):
            if start:
                yield Lines(name, first, raw[:start])
            first += raw.count(b"\n", 0, start)
            length = LONGEST_LINE + _past_line(stream)
            limit = LONGEST_LINE >> 20
            reason = f"a line of {length:,} bytes; at most {limit} MiB are read as one record"
            yield [Refusal(f"{name}:{first}", reason)]
            first += 1
        else:
            yield Lines(name, first, raw)
            first += raw.count(b"\n")


def _past_line(stream: BinaryIO) -> int:
    """Read to the end of the line and forget it; its length."""
    length = 0
    while part := stream.readline(CHUNK_BYTES):
        length += len(part)
        if part.endswith(b"\n"):
            break
    return length


def parse_chunk(chunk: Chunk) -> list[Found | Refusal]:
    """Every value of a chunk with its origin, or the reason why a line is none; blank lines are passed over."""
    if isinstance(chunk, list):
        return chunk
    raw, name = chunk.raw, chunk.name
    if chunk.first == 1:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    parsed: list[Found | Refusal] = []
    for number, line in enumerate(raw.split(b"\n"), chunk.first):
        if line and not line.isspace():
            parsed.append(_parse(line, f"{name}:{number}"))
    return parsed


def _parse(line: bytes, origin: str) -> Found | Refusal:
    try:
        return Found(DECODER.decode(line.decode()), origin)
    except UnicodeDecodeError as error:
        return Refusal(origin, encoding_reason(line, error.start))
    except json.JSONDecodeError as error:
        return Refusal(origin, f"not JSON at column {error.colno}: {_why(line, error)}")
    except (ValueError, RecursionError) as error:
        return Refusal(origin, f"JSON that cannot be read: {error}")


def _why(line: bytes, error: json.JSONDecodeError) -> str:
    if b"\0" in line:
        return NUL_BYTES
    if line.startswith(codecs.BOM_UTF8):
        return "a byte-order mark in the middle of the file, as where two files were joined; remove these three bytes"
    if error.msg == "Extra data":
        return "text behind the end of the record; one record a line is expected"
    if line.strip() in (b"{", b"["):
        return f"{error.msg}; one record a line is expected, or a JSON array of them"
    return error.msg


NUL_BYTES = "it holds NUL bytes, as a file does that was not written to its end"


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that stands twice, json would keep the last in silence."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'key "{next(key for key in keys if keys.count(key) > 1)}" stands twice')
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def encoding_reason(line: bytes, at: int) -> str:
    """Why a line is refused that is not UTF-8 at byte `at`, and what mends it."""
    reason = f"not UTF-8 at byte {at + 1}"
    try:
        line.decode("gb18030")
    except UnicodeDecodeError:
        return f"{reason}; save the file as UTF-8"
    return f"{reason}; it may be GBK: iconv -f GB18030 -t UTF-8 OLD > NEW"
