"""Sources: the values of any source of records, each with its origin.

Read are JSONL, a JSON array, CSV and TSV (each plain, .gz or .zst), Parquet, Arrow, a folder of `datasets` or of
LLaMA-Factory, and a data set on the hub. All are streamed. The first bytes of a file decide its kind; its extension
decides only if they fit several.
"""

import codecs
import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import BinaryIO, TypeGuard

from atomtune.choices import FormatName
from atomtune.data.reading import hub, jsonl
from atomtune.data.reading.arrow_rows import ARROW_MAGIC, BATCH_ROWS, read_arrow, read_parquet
from atomtune.data.reading.compression import GZIP, ZSTD, compression_of, ending_of, open_bytes, open_raw
from atomtune.data.reading.csv_rows import columns_of, read_table, separator_line
from atomtune.data.reading.dataset_info import FILE_NAME, ListedFile, listed_files
from atomtune.data.reading.json_array import read_array
from atomtune.data.reading.raw import Chunk, RawRecord, printable
from atomtune.data.reading.transcoding import as_utf8, encoding_of
from atomtune.data.records import Refusal
from atomtune.disk import LFS_POINTER
from atomtune.errors import BadData

Advance = Callable[[int], None]
HEAD_BYTES = 4096
PARQUET_MAGIC = b"PAR1"
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
    GZIP: "gzip",  # inside another compressed file
    ZSTD: "zstd",
    PARQUET_MAGIC: "Parquet",
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


@dataclass(frozen=True)
class DataFile:
    """One file of a source; format, keys and roles are those that a dataset_info.json gives it, if there is one."""

    name: str  # in origins
    chunks: Iterator[Chunk]
    format: FormatName | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)


def distinct_names(sources: Sequence[Path | str]) -> list[str]:
    """A name for each source, for origins: its file name, with as much of the path as is needed to make it unique.

    A data set on the hub keeps its whole name. Control characters are escaped, so that a terminal does not obey them.
    """
    parts = [(source,) if _is_on_hub(source) else _described(Path(source)).parts for source in sources]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = 1
        while length < len(own) and any(other[-length:] == own[-length:] for other in others):
            length += 1
        names.append(printable(Path(*own[-length:]).as_posix()) if own else "")
    return names


def read_files(
    source: Path | str, advance: Advance = lambda n_bytes: None, *, name: str | None = None
) -> Iterator[DataFile]:
    """The files of a source, one after the other; read each to its end before you take the next.

    Reading chunks is cheap. The slow part, parsing the lines of JSON, is left to parse_chunk, in any process.
    source   a file, a folder, or the name of a data set on the hub (`owner/name`, `owner/name:configuration`)
    advance  called with the number of bytes read since the last call, before decompression; they add up to
             size_of(source)
    name     the name of the source in origins; default: that of distinct_names
    Raises BadData if the source is missing, empty, damaged, or not of a kind that is read here.
    """
    name = printable(distinct_names([source])[0] if name is None else name)
    if _is_on_hub(source):
        yield DataFile(name, hub.read_hub(source, name=name))
        return
    path = _existing(source)
    if not path.is_dir():
        yield DataFile(name, _read_file(path, name, advance))
    elif hub.is_saved(path):
        yield DataFile(name, hub.read_saved(path, advance, name=name))
    else:
        for file in _files_in(path):
            # With the folder's name, to tell its files apart: chats/zh/train.jsonl
            file_name = printable(f"{name}/{file.path.relative_to(path).as_posix()}")
            chunks = _read_file(file.path, file_name, advance)
            yield DataFile(file_name, chunks, file.format, file.keys, file.roles)


def refuse_missing_sources(sources: Sequence[str]) -> None:
    """Raise BadData for the first source that is neither a file, a folder nor the name of a data set on the hub."""
    for source in sources:
        if not hub.is_hub_name(source):
            _existing(source)


def _is_on_hub(source: Path | str) -> TypeGuard[str]:
    return isinstance(source, str) and hub.is_hub_name(source)


def _existing(source: Path | str) -> Path:
    path = _described(Path(source))
    if not path.exists():
        if any(sign in str(path) for sign in "*?["):
            raise BadData(
                f"{path}: no such file. Patterns are expanded by the shell, but not in quotes or in a YAML file: name "
                "the files one by one, or their folder."
            )
        raise BadData(f"{path}: no such file. Pass the data file with --dataset_path.")
    if not path.is_file() and not path.is_dir():
        raise BadData(f"{path}: not a file. Pass a data file with --dataset_path.")
    return path


def _described(path: Path) -> Path:
    """The folder, if the path is that of its dataset_info.json; any other path unchanged."""
    if path.name == FILE_NAME and listed_files(path.parent) is not None:
        return path.parent
    return path


def _files_in(folder: Path) -> list[ListedFile]:
    """The data files of a folder: those that its dataset_info.json lists, or else those that `datasets` chooses."""
    listed = listed_files(folder)
    if listed is not None:
        return listed
    return [ListedFile(file) for file in hub.files_of(folder)]


def note_on_splits(source: Path | str, name: str) -> str:
    """A note for the user if a data set has more splits than the one that is read, else "".

    name  of the source in origins
    Raises BadData like `read_files`.
    """
    if _is_on_hub(source):
        unread = hub.unread_splits_on_hub(source)
    else:
        path = _existing(source)
        unread = hub.unread_splits(path) if path.is_dir() and listed_files(path) is None else []
    return f"{name}: only its split train is read, not {', '.join(unread)}." if unread else ""


def size_of(source: Path | str) -> int:
    """The total number of bytes that `advance` will be called with; 0 if it is not known in advance."""
    if _is_on_hub(source):
        return 0
    path = Path(source)
    if not path.exists():
        return 0
    path = _existing(path)
    if not path.is_dir():
        return path.stat().st_size
    files = hub.all_files(path) if hub.is_saved(path) else [file.path for file in _files_in(path)]
    return sum(file.stat().st_size for file in files)


def fingerprint_of(source: Path | str) -> str:
    """SHA-256 of a file, of the names and contents of a folder's files, or of the revision fetched from the hub.

    Raises BadData if the source does not exist.
    """
    if _is_on_hub(source):
        return hub.hub_fingerprint(source)
    path = _existing(source)
    if path.is_file():
        return _sha256(path)
    lines = [f"{file.relative_to(path).as_posix()} {_sha256(file)}\n" for file in hub.all_files(path)]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def joint_fingerprint(fingerprints: Sequence[str]) -> str:
    """One hash for a data set of several sources; a single source keeps its own."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256("".join(fingerprints).encode()).hexdigest()


def stamp_of(source: Path | str) -> list[tuple[str, int, int]]:
    """Path, size and mtime in ns of every file of a source; empty for the hub, whose cached files are named by hash."""
    path = _described(Path(source))
    stamps = []
    for file in hub.all_files(path) if path.is_dir() else [path]:
        with contextlib.suppress(OSError):  # it is gone, and its missing entry shows as a change
            status = file.stat()
            stamps.append((str(file), status.st_size, status.st_mtime_ns))
    return stamps


def would_hold(source: Path | str, path: Path) -> bool:
    """Whether a file written at `path` would be read as one of the data files of `source`, a folder."""
    folder, place = _described(Path(source)).resolve(), path.resolve()
    if not folder.is_dir() or not place.is_relative_to(folder):
        return False
    return not any(part.startswith(".") for part in place.relative_to(folder).parts)


def among_records(sources: Sequence[Path | str], folder: Path) -> Iterator[str]:
    """Problems with an output folder: one for each source that would read the output files as records."""
    for source in sources:
        if would_hold(source, folder):
            yield (
                f"--output_dir {folder} is in {source}, where its files would be read as records. Pass another folder."
            )


def _sha256(path: Path) -> str:
    with open_raw(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_file(path: Path, name: str, advance: Advance) -> Iterator[Chunk]:
    with open_raw(path) as raw:
        is_compressed = compression_of(raw.read(4)) is not None
    ending = ending_of(path)
    with open_bytes(path, name=name) as stream:
        head = stream.read(HEAD_BYTES)
    if head.startswith(PARQUET_MAGIC) and not is_compressed:
        yield from read_parquet(path, name, advance)
        return
    is_stream = ending == ".arrow" and head.startswith(_ARROW_STREAM)
    if (is_stream or head.startswith(ARROW_MAGIC)) and not is_compressed:
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
    if not head.removeprefix(codecs.BOM_UTF8).strip() and len(head) < HEAD_BYTES:
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
    header = rest.partition("\n")[0] if separator_line(first_line) else first_line
    columns, separator = columns_of(header.strip())
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
