"""Cache entry: a folder of two files and their checksums, which is complete or not there, whoever shares the cache."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import datasets
from datasets.arrow_writer import ArrowWriter

from atomtune.data.encoded_source import EncodedPart
from atomtune.data.example_table import FEATURES, copies_in
from atomtune.data.ledger import Ledger
from atomtune.disk import read_json_object, sha256_of, sync
from atomtune.errors import BadData, BadSettings
from atomtune.folders import scratch_folder

#: The files of an entry.
EXAMPLES = "examples.arrow"
LEDGER = "ledger.json"
CHECKSUMS = "checksums.json"
#: Errors of a rename whose target exists and cannot be replaced.
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EACCES}
#: Attempts to take a name that other processes may take at the same moment.
_ATTEMPTS = 10


def own_entry(place: Path) -> Path:
    """The path of this user's own entry, for a broken shared entry that belongs to another user."""
    return place.with_name(f"{place.name}-{os.getuid() if hasattr(os, 'getuid') else 0}")


def entry_problem(entry: Path) -> str:
    """Why a cache entry cannot be used; "" if it is intact.

    Every file is read in full and its checksum compared: a flipped bit in a token id would go unnoticed otherwise.
    """
    try:
        checksums = read_json_object(entry / CHECKSUMS)
        if checksums.keys() != {EXAMPLES, LEDGER}:
            return f"{CHECKSUMS} was written by another version"
        for file_name, checksum in checksums.items():
            if _checksum(entry / file_name) != checksum:
                return f"{file_name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({type(error).__name__})"
    return ""


def _checksum(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return sha256_of(path)


def write_entry(entry: Path, name: str, ledger: Ledger, parts: Iterable[EncodedPart]) -> Path:
    """Write the entry to a temporary folder next to its place, sync it and rename it, so it is never seen half-written.

    Returns the entry's path. Raises BadData if there are no records.
    """
    _prepare(entry.parent)
    _sweep(entry.parent)
    with scratch_folder(".new-", within=entry.parent) as scratch:
        folder = scratch / entry.name
        folder.mkdir()  # permissions from the umask, for a shared cache; the temporary folder itself is private
        writer = ArrowWriter(path=str(folder / EXAMPLES), features=FEATURES)
        for part in parts:
            writer.write_table(part.table)
        if ledger.records_read == 0:
            raise BadData(
                f"{name}: it holds no records. Expected one JSON object per line: instruction, input, output."
            )
        writer.finalize()
        writer.close()
        ledger.records_copied = copies_in(datasets.Dataset.from_file(str(folder / EXAMPLES)))
        (folder / LEDGER).write_text(json.dumps(ledger.to_json(), ensure_ascii=False), encoding="utf-8")
        checksums = {file_name: _checksum(folder / file_name) for file_name in (EXAMPLES, LEDGER)}
        (folder / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
        for path in (folder / EXAMPLES, folder / LEDGER, folder / CHECKSUMS, folder):
            sync(path)
        return _put(folder, entry, scratch)


def _put(folder: Path, place: Path, scratch: Path) -> Path:
    """Rename the finished folder to the shared entry, or to this user's own if a broken one of another user is there.

    Returns the entry's path. Raises BadSettings if neither name can be used.
    """
    for entry in (place, own_entry(place)):
        if _takes(folder, entry, scratch):
            sync(entry.parent)
            return entry
    why = "its examples are incomplete, belong to another user and cannot be replaced"
    raise BadSettings([f"{place}: {why}. Set HF_DATASETS_CACHE to another folder."])


def _takes(folder: Path, entry: Path, scratch: Path) -> bool:
    """Try to rename the finished folder to `entry`; a broken entry there is moved aside.

    True if `entry` is intact afterwards, which may also be another process's equal entry.
    """
    for attempt in range(_ATTEMPTS):
        try:
            folder.rename(entry)
            return True
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        if not entry_problem(entry):
            return True  # another process wrote the same entry first; its content is equal
        try:
            # Moved aside, not emptied: another process may still be reading the old files.
            entry.rename(scratch / f"not-whole-{attempt}")
        except FileNotFoundError:  # another process has just moved it
            continue
        except PermissionError:
            return False
    return False


def _sweep(cache: Path) -> None:
    """Remove temporary folders of killed processes: those older than a day."""
    for left in cache.glob(".new-*"):
        with contextlib.suppress(OSError):  # removed in the meantime, or another user's
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left, ignore_errors=True)


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = f"finished examples cannot be stored here: {error.strerror}"
        raise BadSettings([f"{folder}: {why}. Set HF_DATASETS_CACHE to a folder that can be written."]) from None
