"""Disk: a file or folder is written whole or not at all, or goes with its process; which errors are the disk's."""

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

from filelock import FileLock, Timeout

from atomtune.errors import BadSettings
from atomtune.language import message

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: The write failed for want of space or of a working disk, not by a bug.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE}
#: What stands at a place, or who may use it, is not what was thought.
_PLACE_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.ETXTBSY, errno.ENXIO, errno.EROFS),
}
#: The system's words for what stands against a place or an address, as other languages find them: Python has them in
#: English in every locale.
SYSTEM_WORDS = (
    *("No such file or directory", "Not a directory", "Is a directory", "File exists", "Directory not empty"),
    *("Permission denied", "Operation not permitted", "Read-only file system", "Text file busy"),
    *("No space left on device", "Disk quota exceeded", "File too large", "Input/output error", "Stale file handle"),
    *("File name too long", "Too many levels of symbolic links", "No such device or address", "Invalid argument"),
    *("Address already in use", "Cannot assign requested address", "Too many open files", "Bad file descriptor"),
)
#: tempfile, where no place takes a file of four bytes.
_NO_TEMPORARY_FOLDER = "No usable temporary directory"
#: The same in the system's words, which is all that a library's own kind of error keeps of them.
_DISK_WORDS = (
    *(os.strerror(code) for code in _DISK_ERRORS - {errno.EFBIG}),
    _NO_TEMPORARY_FOLDER,
)
#: By which processes on Linux hand each other data, and less than which is none; torch's words where it is full.
_SHARED, _LEAST_SHARED, _SHARED_WORDS = Path("/dev/shm"), 2**16, "shared memory(shm)"
#: safetensors, which is written in Rust.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
#: torch.save closes its archive, finds fewer bytes than it wrote and says only that: no errno, no class of its own.
_TORCH_WROTE_LESS = re.compile(r"unexpected pos \d+ vs \d+|file write failed|iostream error")
#: What is written to learn why torch could not write, in bytes: more than the last blocks of a disk that is full.
_PROBE_BYTES = 2**20
#: A run.json that names a million refused records has half of it.
_MOST_BYTES_OF_TEXT = 2**28
#: The first bytes of the small text that git leaves in place of a large file that was not fetched.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
#: Behind the name of a file that is being written.
_PART = ".part"
#: In a folder that one process holds.
_LOCK = ".lock"
#: In a folder that a command fills: what is not yet finished of it.
_UNFINISHED = ".unfinished"


def disk_failed(error: BaseException) -> bool:
    """Whether a write failed because of the disk; torch and safetensors, written in C++ and Rust, say so in words."""
    text = str(error)
    number = _OS_ERROR.search(text)
    code = int(number.group(1)) if number else getattr(error, "errno", None)
    if code in _DISK_ERRORS or any(words in text for words in _DISK_WORDS):
        return True
    return _TORCH_WROTE_LESS.search(text) is not None


def disk_reason(error: BaseException, folder: Path) -> str:
    """Why the disk did not take what was to be written in a folder, in the system's words and not in a library's.

    torch names no reason, so the disk is asked again with a write of our own, while what torch wrote is still there.
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
    """Whether that write went to no folder of the user's choice."""
    return _NO_TEMPORARY_FOLDER in str(error)


def sharing_problem(error: BaseException) -> str:
    """That processes cannot share memory, where that is why; the system says it as of a full disk, without a name."""
    cannot = _SHARED_WORDS in str(error)
    if isinstance(error, OSError) and error.filename is None:
        if _SHARED.is_dir():
            no_room = shutil.disk_usage(_SHARED).free < _LEAST_SHARED or not os.access(_SHARED, os.W_OK)
            cannot |= no_room and error.errno in {*_DISK_ERRORS, errno.EACCES}
        elif sys.platform == "linux":
            cannot |= error.errno == errno.ENOENT
    return no_shared_memory(str(error)) if cannot else ""


def no_shared_memory(found: str) -> str:
    """What is said of it, and what helps."""
    return (
        f"{_SHARED}, through which processes share memory, is full or cannot be written ({found}).\nFree some of it, "
        "or give the container more: docker run --shm-size=1g."
    )


def place_problem(error: BaseException) -> str:
    """Why a file cannot be where it was to be read or written, which is the place's fault; "" for any other error."""
    if not isinstance(error, OSError) or error.errno not in _PLACE_ERRORS or error.filename is None:
        return ""
    return f"{error.filename}: {error.strerror}."


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in, which takes the place of `path` when all of it is on the disk.

    A reader never sees half a file. A link under either name is replaced, never written through; a folder, a device or
    a pipe is not: a file in place of /dev/full would be missed by everybody. Raises OSError.
    """
    with contextlib.suppress(FileNotFoundError):
        kind = path.lstat().st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISLNK(kind):
            raise FileExistsError(errno.EEXIST, "something other than a file is there", str(path))
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART}")
    try:
        with beside.open("xb") as file:  # x: never through a link that waits under this name
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text in UTF-8.

    What a name has of bytes that are no UTF-8 is written as `\\udcff`, which in JSON and YAML is the same again.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a file by these values as JSON; JSON has no NaN and no infinity, so these become null."""
    write_text(path, json.dumps(only_finite(values), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def only_finite(value: Any) -> Any:
    """The value as JSON can keep it: every number in it that is NaN or infinite is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: only_finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [only_finite(item) for item in value]
    return value


def sha256_of(path: Path) -> str:
    """The hash of all bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_of(path: Path) -> str:
    """A file's text; what is no file is not waited for, as a pipe, nor read for ever, as /dev/zero.

    Raises OSError where it cannot be read, ValueError where it is no UTF-8 or larger than any file of settings.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    if status.st_size > _MOST_BYTES_OF_TEXT:
        raise ValueError(f"{status.st_size:,} bytes are too many for such a file")
    return path.read_text(encoding="utf-8")


def read_json_object(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises OSError where it cannot be read, ValueError where it holds anything else."""
    try:
        values = json.loads(text_of(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("not an object")
    return values


def why_unwritable(folder: Path, *, n_bytes: int = 0) -> str:
    """Why a file of so many bytes cannot be written in a folder, which may have to be made; "" where it can.

    Asked before long work.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(n_bytes))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def is_free(folder: Path) -> bool:
    """Whether a command may fill this folder: it is not there, empty, or all that a stopped command left."""
    if not folder.exists():
        return not folder.is_symlink()
    return folder.is_dir() and all(path.name == _UNFINISHED for path in folder.iterdir())


@contextlib.contextmanager
def held(folder: Path, holder: str) -> Iterator[None]:
    """An output folder, made if need be, in which no other process of ours writes until the block is done.

    holder  what fills it, a run or a sweep
    One that was made for the block and holds nothing behind it is removed: what was to write there was refused.
    Raises BadSettings where another process holds it, or it cannot be made or written.
    """
    is_new = not folder.exists()
    elsewhere = BadSettings([f"{folder}: another {holder} is already writing here. Pass another --output_dir."])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise elsewhere from None
    except OSError as error:
        raise BadSettings([f"--output_dir {folder} cannot be made or written: {error.strerror}."]) from None
    try:
        try:
            descriptor = _locked(folder)  # too: the file may be removed while a run goes, and made anew
        except BlockingIOError:
            raise elsewhere from None
        ours = identity_of(folder)
        try:
            yield
        finally:
            if is_new and identity_of(folder) == ours and all(path.name == _LOCK for path in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
            if descriptor is not None:
                os.close(descriptor)
    finally:
        lock.release()


def was_left(folder: Path) -> bool:
    """Whether what held this folder is gone: nobody holds it now. False where that cannot be told."""
    if fcntl is None:
        return False
    try:
        with (folder / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back when the file is closed
    except OSError:  # held, or never was; some network file systems know no locks
        return False
    return True


@contextlib.contextmanager
def filled(folder: Path, *, last: str) -> Iterator[Path]:
    """A place to write a folder's files, which get into the folder when the block is done; none of them before.

    It lies inside the folder, which may be a disk of its own. What a killed process left there is removed.
    last  the file by which others tell that the folder is whole
    Raises BlockingIOError where another process fills the folder now.
    """
    is_new = not folder.exists()
    staging = folder / _UNFINISHED
    staging.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder)
    try:
        new_folder(staging)
        yield staging
        publish(staging, folder, last=last)
    finally:
        remove_tree(staging)
        if is_new:
            with contextlib.suppress(OSError):  # it holds what was written
                folder.rmdir()
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """The folder held against other processes, as an open descriptor; None where the system cannot."""
    if fcntl is None:
        return None
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise
    except OSError:  # some network file systems lock files but not folders
        pass
    return opened


class TemporaryFolder:
    """A folder that goes with this process, by `remove` or at its end; a killed one's goes when the next is made.

    kind  how its name begins, which is all that those of one use have in common
    """

    def __init__(self, kind: str) -> None:
        _remove_orphans(kind)
        self._lock: int | None = None
        while not self._is_made(kind):
            pass

    def _is_made(self, kind: str) -> bool:
        """Make it and hold it; False where another process took it for an orphan in the moment between."""
        self._folder = tempfile.TemporaryDirectory(prefix=kind, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        try:
            self._lock = _locked(self.path)
        except (BlockingIOError, FileNotFoundError):
            return False
        if not self.path.exists():
            self.remove()
            return False
        return True

    def remove(self) -> None:
        self._folder.cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_orphans(kind: str) -> None:
    """Remove this user's temporary folders of a kind that no process holds; the system frees those of a killed one."""
    if fcntl is None:
        return
    for folder in Path(tempfile.gettempdir()).glob(f"{kind}*"):
        with contextlib.suppress(OSError):  # another's, held, or gone meanwhile
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            opened = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(folder)
            finally:
                os.close(opened)


def publish(staging: Path, folder: Path, *, last: str) -> None:
    """Move the files of a staged folder into another, each in one rename; `last` is the one that others wait for."""
    open_to_umask(staging)
    sync_tree(staging)
    files = sorted(file for file in staging.rglob("*") if file.is_file())
    for file in sorted(files, key=lambda file: file == staging / last):
        goal = folder / file.relative_to(staging)
        goal.parent.mkdir(parents=True, exist_ok=True)
        file.replace(goal)
    remove_tree(staging)
    sync(folder)


def numbered(path: Path) -> Path:
    """The first of path-1, path-2, … that does not exist."""
    number = 1
    while (free := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return free


def expanded(path: str) -> Path:
    """The path with `~` as a user's home; pathlib's own way raises RuntimeError where there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def identity_of(folder: Path) -> tuple[int, int] | None:
    """Which folder stands under this name: another one has another pair of numbers; None where there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def open_to_umask(folder: Path) -> None:
    """Give every file the mode of an ordinary new one; safetensors makes its files readable for their owner alone."""
    mask = os.umask(0o077)  # the mask can only be read by setting another
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


def new_folder(path: Path) -> None:
    """An empty folder of its own under this name, whatever stood there before."""
    remove_tree(path)
    path.mkdir(parents=True)


def remove_tree(path: Path) -> None:
    """Remove a folder as far as that goes; of a link only the link, never what it leads to."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes were writing beside its name; for the only one who writes in this folder."""
    for part in folder.glob(f".*{_PART}"):
        remove_tree(part)


def sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk; Windows opens no folders."""
    if os.name == "nt" and path.is_dir():
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_tree(folder: Path) -> None:
    """Bring a folder and all in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
