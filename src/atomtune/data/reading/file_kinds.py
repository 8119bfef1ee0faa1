"""File kinds: the values of one file. Its first bytes decide its kind, its extension only if they fit several."""

import codecs
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import BinaryIO

from atomtune.data.reading import jsonl
from atomtune.data.reading.arrow_rows import ARROW_MAGIC, BATCH_ROWS, read_arrow, read_parquet
from atomtune.data.reading.compression import GZIP, ZSTD, compression_of, ending_of, open_bytes, open_raw
from atomtune.data.reading.csv_rows import columns_of, read_table, separator_line
from atomtune.data.reading.json_array import read_array
from atomtune.data.reading.raw import Chunk, RawRecord
from atomtune.data.reading.transcoding import as_utf8, encoding_of
from atomtune.data.records import Refusal
from atomtune.disk import LFS_POINTER
from atomtune.errors import BadData

_HEAD_BYTES = 4096
_PARQUET_MAGIC = b"PAR1"
#: An Arrow stream has no magic number, but begins with this continuation marker.
_ARROW_STREAM = b"\xff\xff\xff\xff"
_NOT_READ = {
    b"PK\x03\x04": "zip (or xlsx)",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf": "7z",
    b"\xd0\xcf\x11\xe0": "xls (or doc)",
    b"SQLite format 3": "SQLite",
    b"ustar": "tar",
    b"\x04\x22\x4d\x18": "lz4",
    b"%PDF-": "PDF",
    b"\x80\x04\x95": "pickle",
    b"\x80\x05\x95": "pickle",
    GZIP: "gzip",  # inside another compressed file
    **dict.fromkeys(ZSTD, "zstd"),
    _PARQUET_MAGIC: "Parquet",
    ARROW_MAGIC: "Arrow",
}
#: Offsets of magic numbers that are not at the start of the file.
_PLACES = {b"ustar": 257}
#: A line with a key and the start of its list of objects.
_LIST_OF_OBJECTS = re.compile(rb'^\s*"(\w+)"\s*:\s*\[\s*\{', re.ASCII | re.MULTILINE)
_HTML = (b"<!doctype html", b"<html")
_PLAIN_TEXT = (".txt", ".md")
#: A first line with one of these cells is the header of a table.
_COLUMNS = {"instruction", "output", "messages", "conversations", "prompt", "completion", "question", "answer"}


def read_file(path: Path, name: str, advance: Callable[[int], None]) -> Iterator[Chunk]:
    """The values of one file in chunks, as `sources.read_files` gives them for a whole source."""
    with open_raw(path) as raw:
        is_compressed = compression_of(raw.read(4)) is not None
    ending = ending_of(path)
    with open_bytes(path, name=name) as stream:
        head = stream.read(_HEAD_BYTES)
    if head.startswith(_PARQUET_MAGIC) and not is_compressed:
        yield from read_parquet(path, name, advance)
        return
    if head.startswith((ARROW_MAGIC, _ARROW_STREAM)) and not is_compressed:
        yield from read_arrow(path, name, advance)
        return
    encoding = encoding_of(head)
    if encoding != "utf-8":
        head = head.decode(encoding, "replace").encode("utf-8", "replace")
    _refuse_no_text(path, head)
    reader = _reader_of(path, ending, head)
    with open_bytes(path, advance, name=name) as stream:
        text = stream if encoding == "utf-8" else as_utf8(stream, encoding, name)
        yield from reader(text, name)


def _refuse_no_text(path: Path, head: bytes) -> None:
    """Raise BadData if the first bytes are not those of a text; otherwise each of its lines would be reported."""
    for magic, kind in _NOT_READ.items():
        if head.startswith(magic, _PLACES.get(magic, 0)):
            raise BadData(f"{path}: a {kind} file; expected text. Unpack it, or save it as CSV (UTF-8) or JSONL.")
    if head.startswith(LFS_POINTER):
        raise BadData(
            f"{path}: a git-lfs pointer, not the file itself.\n"
            f"Fetch the files: git lfs install && git -C {quote(str(path.parent))} lfs pull"
        )
    if head.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith(_HTML):
        raise BadData(f"{path}: a web page, such as a login or error page; expected records. Download the file itself.")
    if not head.removeprefix(codecs.BOM_UTF8).strip() and len(head) < _HEAD_BYTES:
        raise BadData(f"{path}: the file is empty. Expected one JSON object per line: instruction, input, output.")


def _reader_of(path: Path, ending: str, head: bytes) -> Callable[[BinaryIO, str], Iterator[Chunk]]:
    """The reader for a text file with these first bytes. Raises BadData for a CSV table with a JSON extension."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"["):
        return _array_chunks
    if text.startswith(b"{"):
        if not text.partition(b"\n")[0].strip(b"{ \t\r") and b"\n" in text:
            raise BadData(_over_lines(path, text))
        return jsonl.read_chunks
    if ending in (".parquet", ".arrow"):
        raise BadData(f"{path}: it does not start like a {ending} file. Download or write it again.")
    # Not JSON. It is a table if its header or the extension says so; else each line is refused as not JSON.
    first_line, _, rest = text.decode("utf-8", "replace").partition("\n")
    declared = separator_line(first_line)
    header = rest.partition("\n")[0] if declared else first_line
    columns, separator = columns_of(header.strip(), declared)
    if ending in (".csv", ".tsv"):
        return _table_chunks
    if len(columns) < 2 or _COLUMNS.isdisjoint(columns):
        if ending in _PLAIN_TEXT:
            raise BadData(
                f"{path}: plain text; expected records. A table is read if its name ends in .csv or .tsv. To learn "
                'texts, write each as {"text": …} on a line of a JSONL file, none longer than --max_seq_length.'
            )
        return jsonl.read_chunks
    if ending in (".jsonl", ".ndjson", ".json"):
        table_ending = ".tsv" if separator == "\t" else ".csv"
        raise BadData(
            f"{path}:1: a table with columns (CSV); expected one JSON object per line. Rename it, and it is read as a "
            f"table:\n  mv {quote(str(path))} {quote(str(path.with_suffix(table_ending)))}"
        )
    return _table_chunks


def _over_lines(path: Path, text: bytes) -> str:
    """The error for a file whose first object spans several lines, with a jq command that fixes it."""
    wrapped = _LIST_OF_OBJECTS.search(text)
    program = f'.["{wrapped.group(1).decode()}"][]' if wrapped else "."
    place = f'; its records seem to be in the list under "{wrapped.group(1).decode()}"' if wrapped else ""
    return (
        f"{path}:1: an object over several lines; expected one record per line, or a JSON array of them{place}.\nWrite "
        f"one per line: jq -c '{program}' {quote(str(path))} > NEW.jsonl"
    )


def _array_chunks(stream: BinaryIO, name: str) -> Iterator[Chunk]:
    return _batched(read_array(stream, name))


def _table_chunks(stream: BinaryIO, name: str) -> Iterator[Chunk]:
    return _batched(read_table(stream, name))


def _batched(values: Iterator[RawRecord] | Iterator[RawRecord | Refusal]) -> Iterator[Chunk]:
    """Group the values into lists of BATCH_ROWS: handing them to workers one by one would be slow."""
    batch: list[RawRecord | Refusal] = []
    for value in values:
        batch.append(value)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
