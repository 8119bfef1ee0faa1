"""JSONL: one JSON value per line; cutting a file into chunks is cheap, and parsing them is left to the workers.

Strictly UTF-8; a BOM and CRLF are accepted. Worker processes load this module, so it imports nothing heavy.
"""

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

from atomtune.data.reading.raw import (
    DECODER,
    LONGEST_LINE,
    NUL_BYTES,
    TOO_DEEP,
    Chunk,
    Lines,
    RawRecord,
    encoding_reason,
    json_reason,
    refuse_deep,
)
from atomtune.data.records import Refusal, RefusalKind

#: Sent to a worker at once: about 1,500 short records.
CHUNK_BYTES = 256 * 2**10


def read_chunks(stream: BinaryIO, name: str) -> Iterator[Chunk]:
    """Cut a stream into chunks of complete lines; a line of LONGEST_LINE bytes or more becomes a Refusal in between."""
    first = 1
    while raw := stream.read(CHUNK_BYTES):
        start = raw.rfind(b"\n") + 1  # of the chunk's last, incomplete line
        if start < len(raw):
            raw += stream.readline(LONGEST_LINE - (len(raw) - start))
        if len(raw) - start == LONGEST_LINE and not raw.endswith(b"\n"):
            if start:
                yield Lines(name, first, raw[:start])
            first += raw.count(b"\n", 0, start)
            length = LONGEST_LINE + _past_line(stream)
            limit = LONGEST_LINE // 10**6
            reason = f"a line of {length:,} bytes; a record may have at most {limit} MB"
            yield [Refusal(f"{name}:{first}", reason, RefusalKind.UNREADABLE)]
            first += 1
        else:
            yield Lines(name, first, raw)
            first += raw.count(b"\n")


def _past_line(stream: BinaryIO) -> int:
    """Skip the rest of the line; returns the number of bytes skipped."""
    length = 0
    while part := stream.readline(CHUNK_BYTES):
        length += len(part)
        if part.endswith(b"\n"):
            break
    return length


def parse_chunk(chunk: Chunk) -> list[RawRecord | Refusal]:
    """Every value of a chunk with its origin, or a Refusal of the line; blank lines are skipped."""
    if isinstance(chunk, list):
        return chunk
    raw, name = chunk.raw, chunk.name
    if chunk.first == 1:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    parsed: list[RawRecord | Refusal] = []
    for number, line in enumerate(raw.split(b"\n"), chunk.first):
        if line and not line.isspace():
            parsed.append(_parse(line, f"{name}:{number}"))
    return parsed


def _parse(line: bytes, origin: str) -> RawRecord | Refusal:
    try:
        value = DECODER.decode(line.decode())
        refuse_deep(value, line.count(b"[") + line.count(b"{"))
        return RawRecord(value, origin)
    except UnicodeDecodeError as error:
        return Refusal(origin, encoding_reason(line, error.start), RefusalKind.UNREADABLE)
    except json.JSONDecodeError as error:
        return Refusal(origin, f"not JSON at column {error.colno}: {_why(line, error)}", RefusalKind.UNREADABLE)
    except RecursionError:
        return Refusal(origin, f"JSON that cannot be read: {TOO_DEEP}", RefusalKind.UNREADABLE)
    except ValueError as error:
        return Refusal(origin, f"JSON that cannot be read: {error}", RefusalKind.UNREADABLE)


def _why(line: bytes, error: json.JSONDecodeError) -> str:
    if b"\0" in line:
        return NUL_BYTES
    if line.startswith(codecs.BOM_UTF8):
        return (
            "a byte-order mark in the middle of the file, probably where two files were joined; "
            "remove these three bytes"
        )
    if error.msg == "Extra data" and line.rstrip().endswith(b"},"):
        return "a comma after the record; expected one record per line, and nothing between the lines"
    if error.msg == "Extra data":
        return "text after the end of the record; expected one record per line"
    if line.strip() in (b"{", b"["):
        return f"{json_reason(error)}; expected one record per line, or a JSON array of them"
    return json_reason(error)
