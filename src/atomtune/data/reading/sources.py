"""Sources: the values of any source of records, each with its origin.

Read are JSONL, a JSON array, CSV and TSV (each plain, .gz or .zst), Parquet, Arrow, a folder of `datasets` or of
LLaMA-Factory, and a data set on the hub. All are streamed.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from atomtune.choices import FormatName
from atomtune.data.reading import hub
from atomtune.data.reading.compression import open_raw
from atomtune.data.reading.dataset_info import FILE_NAME, ListedFile, listed_files, unread_entries
from atomtune.data.reading.file_kinds import read_file
from atomtune.data.reading.raw import Chunk, printable
from atomtune.errors import BadData

Advance = Callable[[int], None]


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
    if name is None:
        name = distinct_names([source])[0]
    if _is_on_hub(source):
        yield DataFile(name, hub.read_hub(source, name=name))
        return
    path = _existing(source)
    if not path.is_dir():
        yield DataFile(name, read_file(path, name, advance))
    elif hub.is_saved(path):
        yield DataFile(name, hub.read_saved(path, advance, name=name))
    else:
        for file in _files_in(path):
            # With the folder's name, to tell its files apart: chats/zh/train.jsonl
            file_name = printable(f"{name}/{file.path.relative_to(path).as_posix()}")
            chunks = read_file(file.path, file_name, advance)
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


def notes_on(source: Path | str, name: str) -> list[str]:
    """Notes for the user on what a source holds and is not read: splits beside train, and files of a folder.

    name  of the source in origins
    Raises BadData like `read_files`.
    """
    if _is_on_hub(source):
        return _notes_on_splits(hub.unread_splits_on_hub(source), name)
    path = _existing(source)
    if not path.is_dir():
        return []
    listed = listed_files(path)
    if listed is not None:
        return _notes_on_unlisted(path, listed, name)
    notes = _notes_on_splits(hub.unread_splits(path), name)
    others = [] if hub.is_saved(path) else hub.other_files(path)
    if others:
        first = printable(others[0].relative_to(path).as_posix())
        notes.append(f"{name}: files that do not end like a data file are not read: {len(others):,}, first {first}.")
    return notes


def _notes_on_splits(unread: Sequence[str], name: str) -> list[str]:
    return [f"{name}: only its split train is read, not {', '.join(unread)}."] if unread else []


def _notes_on_unlisted(folder: Path, listed: Sequence[ListedFile], name: str) -> list[str]:
    """Notes on data files that the folder's dataset_info.json does not list, and on its entries that name no file."""
    notes = []
    read = {file.path.resolve() for file in listed}
    unlisted = [path for path in hub.all_files(folder) if hub.is_data_file(path) and path.resolve() not in read]
    if unlisted:
        first = printable(unlisted[0].relative_to(folder).as_posix())
        notes.append(
            f"{name}: data files that {FILE_NAME} does not list are not read: {len(unlisted):,}, first {first}."
        )
    if entries := unread_entries(folder):
        first = printable(entries[0])
        notes.append(
            f"{name}: entries of {FILE_NAME} that name no file here, such as data sets on a hub, are not read: "
            f"{len(entries):,}, first {first}. Pass the hub's name of such a data set with --dataset_path."
        )
    return notes


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
