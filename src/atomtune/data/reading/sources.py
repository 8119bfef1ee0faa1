"""Files: values with the place each stands at, from any source of records.

Before: a path or a hub name.  After: formats.py turns each value into a Record.
A file's kind is seen in its first bytes, and only where these fit several in its ending. JSONL (one value a line), a
JSON array, CSV and TSV, each plain, .gz or .zst; Parquet; Arrow; a folder of `datasets`; a data set on the hub. All
are streamed.
"""

import codecs
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from atomtune.data.reading import hub, jsonl
from atomtune.data.reading.arrow_rows import ARROW_MAGIC, BATCH_ROWS, read_arrow, read_parquet
from atomtune.data.reading.compression import open_bytes, open_raw, packing_of
from atomtune.data.reading.csv_rows import columns_of, read_table
from atomtune.data.reading.hub import kind_of
from atomtune.data.reading.json_array import read_array
from atomtune.data.reading.jsonl import parse_chunk
from atomtune.data.reading.raw import Chunk, RawRecord
from atomtune.data.records import Refusal
from atomtune.errors import BadData

Advance = Callable[[int], None]
HEAD_BYTES = 4096
PARQUET_MAGIC = b"PAR1"
#: An Arrow stream has no magic word, but begins like this.
_ARROW_STREAM = b"\xff\xff\xff\xff"
_NOT_READ = {
    b"PK\x03\x04": "zip (or xlsx)",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf": "7z",
    PARQUET_MAGIC: "Parquet",
    ARROW_MAGIC: "Arrow",
}
#: A first line in which one of these is a cell is a table's header.
_COLUMNS = {"instruction", "output", "messages", "conversations", "prompt", "completion", "question", "answer"}


def read_values(source: Path | str, advance: Advance = lambda n_bytes: None) -> Iterator[RawRecord | Refusal]:
    """Yield every value of the source, or the reason why a line or row is none.

    source is a file, a folder, or the name of a data set on the hub (`owner/name`, `owner/name:configuration`).
    advance is called with the number of bytes read since the last call, packed ones where the file is packed; they
    add up to size_of(source).
    Raises BadData when the source is missing, empty, damaged, or nothing that is read here.
    """
    for chunk in read_chunks(source, advance):
        yield from parse_chunk(chunk)


def read_chunks(source: Path | str, advance: Advance = lambda n_bytes: None) -> Iterator[Chunk]:
    """The source in chunks, cheaply: what costs time, parsing lines of JSON, is left to parse_chunk in any process."""
    if isinstance(source, str) and hub.is_hub_name(source):
        yield from hub.read_hub(source)
        return
    path = _existing(source)
    if not path.is_dir():
        yield from _read_file(path, path.name, advance)
    elif hub.is_saved(path):
        yield from hub.read_saved(path, advance)
    else:
        for file in hub.files_of(path):
            # A name that says which of them it is: chats/zh/train.jsonl.
            yield from _read_file(file, f"{path.name}/{file.relative_to(path).as_posix()}", advance)


def _existing(source: Path | str) -> Path:
    path = Path(source)
    if not path.exists():
        raise BadData(f"{path}: no such file. Pass the data file with --dataset_path.")
    if not path.is_file() and not path.is_dir():
        raise BadData(f"{path}: not a file. Pass a data file with --dataset_path.")
    return path


def size_of(source: Path | str) -> int:
    """Bytes that advance will have been called with at the end; 0 where nobody knows beforehand."""
    if isinstance(source, str) and hub.is_hub_name(source):
        return 0
    return sum(file.stat().st_size for file in _files(Path(source)))


def fingerprint_of(source: Path | str) -> str:
    """SHA-256 of a file's bytes, or of the names and bytes of a folder's files; for the hub, of what was fetched.

    Raises BadData where there is nothing to read.
    """
    if isinstance(source, str) and hub.is_hub_name(source):
        return hub.hub_fingerprint(source)
    path = _existing(source)
    if path.is_file():
        return _sha256(path)
    lines = [f"{file.relative_to(path).as_posix()} {_sha256(file)}\n" for file in hub.all_files(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open_raw(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.is_file() else []
    return hub.all_files(path) if hub.is_saved(path) else hub.files_of(path)


def _read_file(path: Path, name: str, advance: Advance) -> Iterator[Chunk]:
    with open_raw(path) as raw:
        packed = packing_of(raw.read(4)) is not None
    with open_bytes(path) as stream:
        head = stream.read(HEAD_BYTES)
    if head.startswith(PARQUET_MAGIC) and not packed:
        yield from read_parquet(path, name, advance)
    elif head.startswith((ARROW_MAGIC, _ARROW_STREAM) if kind_of(path) == ".arrow" else ARROW_MAGIC) and not packed:
        yield from read_arrow(path, name, advance)
    else:
        _refuse_no_text(path, head)
        reader = _reader_of(path, head)
        with open_bytes(path, advance) as stream:
            yield from reader(stream, name)


def _refuse_no_text(path: Path, head: bytes) -> None:
    """Raise BadData for what is no UTF-8 text, as its first bytes tell; else each of its lines would be a problem."""
    for encoding, marks in (
        ("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
        ("UTF-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
    ):
        if head.startswith(marks):
            raise BadData(_to_utf8(path, encoding))
    for order, zeros in (("LE", head[1:64:2]), ("BE", head[0:64:2])):
        if len(zeros) > 1 and not any(zeros) and any(head):
            raise BadData(_to_utf8(path, f"UTF-16{order}"))
    for magic, kind in _NOT_READ.items():
        if head.startswith(magic):
            raise BadData(f"{path}: a {kind} file; expected text. Unpack it, or export it as JSONL.")
    if not head.removeprefix(codecs.BOM_UTF8).strip() and len(head) < HEAD_BYTES:
        raise BadData(f"{path}: the file is empty. Expected one JSON object a line: instruction, input, output.")


def _to_utf8(path: Path, encoding: str) -> str:
    return f"{path}: encoded as {encoding}; expected UTF-8.\n  iconv -f {encoding} -t UTF-8 {path.name} > new.jsonl"


def _reader_of(path: Path, head: bytes) -> Callable[[BinaryIO, str], Iterator[Chunk]]:
    """What reads a text file that begins like this. Raises BadData for a table under the name of JSON."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    kind = kind_of(path)
    if text.startswith(b"["):
        return lambda stream, name: _batched(read_array(stream, name))
    if text.startswith(b"{"):
        return jsonl.read_chunks
    if kind in (".parquet", ".arrow"):
        raise BadData(f"{path}: it does not begin as a {kind} file does. Fetch or write it again.")
    columns, separator = columns_of(text.split(b"\n", 1)[0].decode("utf-8", "replace").strip())
    if kind in (".csv", ".tsv"):
        return lambda stream, name: _batched(read_table(stream, name))
    if len(columns) < 2 or _COLUMNS.isdisjoint(columns):
        return jsonl.read_chunks
    if kind in (".jsonl", ".ndjson", ".json"):
        ending = ".tsv" if separator == "\t" else ".csv"
        raise BadData(
            f"{path}:1: a table with columns (CSV); expected one JSON object a line. Rename it, and it is read as a "
            f"table:\n  mv {path.name} {path.stem}{ending}"
        )
    return lambda stream, name: _batched(read_table(stream, name))


def _batched(values: Iterator[RawRecord] | Iterator[RawRecord | Refusal]) -> Iterator[Chunk]:
    """Values in lists, so that what hands chunks to other processes does not do it one by one."""
    batch: list[RawRecord | Refusal] = []
    for value in values:
        batch.append(value)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
