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
from typing import Any

from atomtune.data.records import Refusal
from atomtune.errors import BadData

_SPACE = re.compile(r"\s*")


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
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadData(f"{path}: encoded as UTF-16; expected UTF-8.\n  iconv -f UTF-16 -t UTF-8 {path.name} > new.jsonl")
    text_head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text_head and path.stat().st_size <= len(head):
        raise BadData(f"{path}: the file is empty. Expected one JSON object a line: instruction, input, output.")
    yield from (_array if text_head.startswith(b"[") else _lines)(path, advance)


def _lines(path: Path, advance: Callable[[int], None]) -> Iterator[Found | Refusal]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            advance(len(line))
            origin = f"{path.name}:{number}"
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.strip():
                yield _parse(content, origin)


def _parse(line: bytes, origin: str) -> Found | Refusal:
    try:
        return Found(json.loads(line.decode("utf-8"), object_pairs_hook=_object), origin)
    except UnicodeDecodeError as error:
        return Refusal(origin, _encoding_reason(line, error))
    except json.JSONDecodeError as error:
        hint = "; one record a line is expected, or a JSON array of them" if line.strip() in (b"{", b"[") else ""
        return Refusal(origin, f"not JSON at column {error.colno}: {error.msg}{hint}")
    except (ValueError, RecursionError) as error:
        return Refusal(origin, f"JSON that cannot be read: {error}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that stands twice, json would keep the last in silence."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'key "{next(key for key in keys if keys.count(key) > 1)}" stands twice')
    return made


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
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    at, line, counted, advanced = _past_space(text, text.index("[") + 1), 1, 0, 0
    closed = text[at : at + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
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
