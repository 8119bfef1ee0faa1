"""Disk: files written completely or not at all, and which errors are the disk's."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from atomtune.language import message
from atomtune.process import signals_wait

#: Errors of a write that mean a full or failing disk, not a bug.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE}
#: Errors of a file system that cannot sync a folder, for example one shared from Windows. PostgreSQL ignores the first
#: two of them as well.
_CANNOT_SYNC = {errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
#: Errors that mean a path has another kind of file or other permissions than expected.
_PLACE_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.ETXTBSY, errno.ENXIO, errno.EROFS),
}
#: Messages of the system about a path or an address, as keys for translations; Python has them in English in every
#: locale.
SYSTEM_WORDS = (
    *("No such file or directory", "Not a directory", "Is a directory", "File exists", "Directory not empty"),
    *("Permission denied", "Operation not permitted", "Read-only file system", "Text file busy"),
    *("No space left on device", "Disk quota exceeded", "File too large", "Input/output error", "Stale file handle"),
    *("File name too long", "Too many levels of symbolic links", "No such device or address", "Invalid argument"),
    *("Address already in use", "Cannot assign requested address", "Too many open files", "Bad file descriptor"),
)
#: Message of tempfile if it can write a small file in none of its folders.
_NO_TEMPORARY_FOLDER = "No usable temporary directory"
#: Messages of these errors, for libraries whose own errors keep only the text.
_DISK_WORDS = (
    *(os.strerror(code) for code in _DISK_ERRORS - {errno.EFBIG}),
    _NO_TEMPORARY_FOLDER,
)
#: Folder for shared memory on Linux, the bytes below which it counts as full, and torch's words for that.
_SHARED, _LEAST_SHARED, _SHARED_WORDS = Path("/dev/shm"), 2**16, "shared memory(shm)"
#: safetensors, which is written in Rust.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
#: Messages of torch.save if fewer bytes arrived in the file than it wrote; there is no errno and no class of its own.
_TORCH_WROTE_LESS = re.compile(r"unexpected pos \d+ vs \d+|file write failed|iostream error")
#: Bytes written to learn why torch could not write: more than the last free blocks of a full disk.
_PROBE_BYTES = 2**20
#: A run.json with a million refused records has half of this size.
_MOST_BYTES_OF_TEXT = 2**28
#: First bytes of the pointer that git-lfs leaves in place of a file that was not fetched.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
#: Suffix of a file that is being written.
_PART = ".part"


def disk_failed(error: BaseException) -> bool:
    """Whether a write failed because of the disk; torch and safetensors (C++, Rust) report that only as text."""
    text = str(error)
    number = _OS_ERROR.search(text)
    code = int(number.group(1)) if number else getattr(error, "errno", None)
    if code in _DISK_ERRORS or any(words in text for words in _DISK_WORDS):
        return True
    return _TORCH_WROTE_LESS.search(text) is not None


def disk_reason(error: BaseException, folder: Path) -> str:
    """Why a write in this folder failed, in the operating system's words if they can be found, else in the library's.

    torch reports no reason. A test write then finds it; the caller must not have removed what torch wrote.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if number := _OS_ERROR.search(text):
        return os.strerror(int(number.group(1)))
    if _TORCH_WROTE_LESS.search(text):
        return why_unwritable(folder, n_bytes=_PROBE_BYTES) or message("not all bytes arrived on the disk")
    return text


def is_without_temporary_folder(error: BaseException) -> bool:
    """Whether no temporary folder could be written, so that the user's own folders are not the cause."""
    return _NO_TEMPORARY_FOLDER in str(error)


def sharing_problem(error: BaseException) -> str:
    """Message if processes cannot share memory, else "". The system reports it like a full disk, without a file."""
    cannot = _SHARED_WORDS in str(error)
    if isinstance(error, OSError) and error.filename is None:
        if _SHARED.is_dir():
            no_room = shutil.disk_usage(_SHARED).free < _LEAST_SHARED or not os.access(_SHARED, os.W_OK)
            cannot |= no_room and error.errno in {*_DISK_ERRORS, errno.EACCES}
        elif sys.platform == "linux":
            cannot |= error.errno == errno.ENOENT
    return no_shared_memory(str(error)) if cannot else ""


def no_shared_memory(found: str) -> str:
    """Message that shared memory cannot be used, with a remedy.

    found  the error in the words of whoever reported it
    """
    return (
        f"{_SHARED}, through which processes share memory, is full or cannot be written ({found}).\nFree some of it, "
        "or give the container more: docker run --shm-size=1g."
    )


def place_problem(error: BaseException) -> str:
    """Message if a path is the reason why a file cannot be read or written; "" for any other error."""
    if not isinstance(error, OSError) or error.errno not in _PLACE_ERRORS or error.filename is None:
        return ""
    return f"{error.filename}: {error.strerror}."


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write in; at the end it replaces `path`, once all of it is on the disk.

    So a reader never sees half a file. Symbolic links under either name are replaced, never followed. Raises OSError,
    also if `path` is a folder, a device or a pipe: replacing /dev/full, for example, would break other programs.
    """
    with contextlib.suppress(FileNotFoundError):
        kind = path.lstat().st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISLNK(kind):
            raise FileExistsError(errno.EEXIST, "something other than a file is there", str(path))
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART}")
    try:
        with beside.open("xb") as file:  # x: fails if a link with this name exists
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file with a text in UTF-8.

    Bytes of a file name that are not UTF-8 are written as `\\udcff`, which JSON and YAML read as the same name again.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a file with these values as JSON; NaN and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(only_finite(values), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def only_finite(value: Any) -> Any:
    """The value with None in place of every number that is NaN or infinite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: only_finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [only_finite(item) for item in value]
    return value


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_of(path: Path) -> str:
    """A file's text. Pipes and devices are refused, because reading them may wait forever or never end.

    Raises OSError if it cannot be read, ValueError if it is not UTF-8 or is larger than 256 MiB.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    if status.st_size > _MOST_BYTES_OF_TEXT:
        raise ValueError(f"{status.st_size:,} bytes are too many for such a file")
    return path.read_text(encoding="utf-8")


def read_json_object(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises OSError if it cannot be read, ValueError if it has anything else."""
    try:
        values = json.loads(text_of(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("not an object")
    return values


def why_unwritable(folder: Path, *, n_bytes: int = 0) -> str:
    """Why a file of this many bytes cannot be written in a folder, which need not exist yet; "" if it can.

    Meant for a check before long work.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(n_bytes))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def expanded(path: str) -> Path:
    """The path with `~` expanded; pathlib's own method raises RuntimeError if there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def remove_tree(path: Path) -> None:
    """Remove a folder as far as possible; of a symbolic link only the link itself.

    A stop signal waits until then: an exception inside shutil.rmtree may make it close a descriptor twice, which is an
    OSError instead.
    """
    with signals_wait():
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove partly written files of killed processes. Call it only if no other process writes in this folder."""
    for part in folder.glob(f".*{_PART}"):
        remove_tree(part)


def sync(path: Path) -> None:
    """Sync a file, or a folder's list of names, to the disk, except on systems that cannot do it for folders."""
    if os.name == "nt" and path.is_dir():
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC or not path.is_dir():
            raise
    finally:
        os.close(opened)
