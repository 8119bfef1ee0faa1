"""Files: JSON values with the line each stands on.

Before: a path.  After: formats.py turns each value into a Record.
JSONL (one value a line) is streamed; a JSON array of the same is read whole. Strictly UTF-8; a BOM and CRLF are fine.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from atomtune.data.records import Refusal
from atomtune.errors import BadData

#: A longer line is refused without being read whole: two million words are no record, and memory stays bounded.
LONGEST_LINE = 16 * 2**20
_SPACE = re.compile(r"\s*")
_NO_TEXT = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip (or xlsx)", b"PAR1": "Parquet", b"ARROW1": "Arrow"}


@dataclass(frozen=True, slots=True)
class Found:
    """A JSON value and where it stands."""

    value: Any
    origin: str


def read_values(path: Path, advance: Callable[[int], None] = lambda n_bytes: None) -> Iterator[Found | Refusal]:
    """Yield every JSON value of the file, or the reason why a line is none.

    advance is called with the number of bytes read since the last call.
    Raises BadData when the file is missing, empty, a folder, or not text at all.
    """
    if not path.exists():
        raise BadData(f"{path}: no such file. Pass the data file with --dataset_path.")
    if not path.is_file():
        raise BadData(f"{path}: not a file. Pass one .jsonl or .json file with --dataset_path.")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise BadData(f"{path}: cannot be read: {error.strerror}.") from None
    _refuse_no_json(path, head)
    text_head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text_head and path.stat().st_size <= len(head):
        raise BadData(f"{path}: the file is empty. Expected one JSON object a line: instruction, input, output.")
    yield from (_array if text_head.startswith(b"[") else _lines)(path, advance)


def _refuse_no_json(path: Path, head: bytes) -> None:
    """Raise BadData for a file of another kind, as its first bytes tell; else each of its lines would be a problem."""
    for encoding, marks in (
        ("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
        ("UTF-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
    ):
        if head.startswith(marks):
            raise BadData(_to_utf8(path, encoding))
    for order, zeros in (("LE", head[1:64:2]), ("BE", head[0:64:2])):
        if len(zeros) > 1 and not any(zeros) and any(head):
            raise BadData(_to_utf8(path, f"UTF-16{order}"))
    for magic, kind in _NO_TEXT.items():
        if head.startswith(magic):
            raise BadData(f"{path}: a {kind} file; expected text. Unpack it, or export it as JSONL.")
    first = head.removeprefix(codecs.BOM_UTF8).lstrip().split(b"\n", 1)[0].strip()
    separator = next((one for one in (b",", b"\t", b";") if one in first), None)
    columns = [word.strip(b' "').lower() for word in first.split(separator)] if separator else []
    if b"output" in columns or b"instruction" in columns:
        raise BadData(
            f"{path}:1: a table with columns (CSV); expected one JSON object a line. To convert it:\n"
            f"  python -c \"import pandas; pandas.read_csv('{path.name}', sep={separator.decode()!r}, dtype=str, "  # type: ignore[union-attr]
            "keep_default_na=False).to_json('new.jsonl', orient='records', lines=True, force_ascii=False)\""
        )


def _to_utf8(path: Path, encoding: str) -> str:
    return f"{path}: encoded as {encoding}; expected UTF-8.\n  iconv -f {encoding} -t UTF-8 {path.name} > new.jsonl"


def _lines(path: Path, advance: Callable[[int], None]) -> Iterator[Found | Refusal]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            advance(len(line))
            origin = f"{path.name}:{number}"
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                length = len(line) + _past_line(file, advance)
                limit = LONGEST_LINE >> 20
                yield Refusal(origin, f"a line of {length:,} bytes; at most {limit} MiB are read as one record")
                continue
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.strip():
                yield _parse(content, origin)


def _past_line(file: BinaryIO, advance: Callable[[int], None]) -> int:
    """Read to the end of the line and forget it; its length."""
    length = 0
    while part := file.readline(LONGEST_LINE):
        advance(len(part))
        length += len(part)
        if part.endswith(b"\n"):
            break
    return length


def _parse(line: bytes, origin: str) -> Found | Refusal:
    try:
        return Found(_DECODER.decode(line.decode("utf-8")), origin)
    except UnicodeDecodeError as error:
        return Refusal(origin, _encoding_reason(line, error))
    except json.JSONDecodeError as error:
        return Refusal(origin, f"not JSON at column {error.colno}: {_why(line, error)}")
    except (ValueError, RecursionError) as error:
        return Refusal(origin, f"JSON that cannot be read: {error}")


def _why(line: bytes, error: json.JSONDecodeError) -> str:
    if b"\0" in line:
        return "it holds NUL bytes, as a file does that was not written to its end"
    if line.startswith(codecs.BOM_UTF8):
        return "a byte-order mark in the middle of the file, as where two files were joined; remove these three bytes"
    if error.msg == "Extra data":
        return "text behind the end of the record; one record a line is expected"
    if line.strip() in (b"{", b"["):
        return f"{error.msg}; one record a line is expected, or a JSON array of them"
    return error.msg


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that stands twice, json would keep the last in silence."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'key "{next(key for key in keys if keys.count(key) > 1)}" stands twice')
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _encoding_reason(raw: bytes, error: UnicodeDecodeError) -> str:
    reason = f"not UTF-8 at byte {error.start + 1}"
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        return f"{reason}; save the file as UTF-8"
    return f"{reason}; it may be GBK: iconv -f GB18030 -t UTF-8 OLD > NEW"


def _array(path: Path, advance: Callable[[int], None]) -> Iterator[Found | Refusal]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadData(f"{path.name}:{line}: {_encoding_reason(raw, error)}") from None
    at, line, counted, advanced = _past_space(text, text.index("[") + 1), 1, 0, 0
    closed = text[at : at + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise BadData(f"{path.name}:{line}: the JSON array breaks here: {error}") from None
        n_bytes = len(text[at:end].encode("utf-8"))
        advance(n_bytes)
        advanced += n_bytes
        yield Found(value, f"{path.name}:{line}")
        at = _past_space(text, end)
        closed = text[at : at + 1] == "]"
        if not closed and text[at : at + 1] != ",":
            line += text.count("\n", counted, at)
            raise BadData(f"{path.name}:{line}: the JSON array breaks here: expected a comma or the closing bracket")
        at = at if closed else _past_space(text, at + 1)
    if text[at + 1 :].strip():
        line += text.count("\n", counted, at)
        raise BadData(f"{path.name}:{line}: text after the end of the JSON array; expected nothing behind its ].")
    advance(len(raw) - advanced)


def _past_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # the pattern matches the empty string too
