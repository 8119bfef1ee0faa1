"""Folders: held against other processes, filled completely or not at all, temporary ones, and their clean-up."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from atomtune.disk import remove_tree, sync
from atomtune.errors import BadSettings
from atomtune.process import signals_wait

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Lock file in a folder that a process uses.
_LOCK = ".lock"
#: Folder with the unfinished files of a command that fills a folder.
_UNFINISHED = ".unfinished"


def is_free(folder: Path) -> bool:
    """Whether a command may fill this folder: it does not exist, is empty, or has only files of a stopped command."""
    if not folder.exists():
        return not folder.is_symlink()
    return folder.is_dir() and all(path.name == _UNFINISHED for path in folder.iterdir())


@contextlib.contextmanager
def held(folder: Path, holder: str) -> Iterator[None]:
    """Within this context no other atomtune process writes in this output folder, which is created if needed.

    holder  what fills the folder, for messages: a run or a sweep
    If the folder was created here and is still empty at the end, it is removed.
    Raises BadSettings if another process uses it, or if it cannot be created or written.
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
        problem = f"--output_dir {folder} cannot be made or written: {error.strerror}. Pass another one."
        raise BadSettings([problem]) from None
    try:
        try:
            # A second lock, because the lock file may be removed and created again during a run
            descriptor = _locked(folder)
        except BlockingIOError:
            raise elsewhere from None
        ours = identity_of(folder)
        try:
            yield
        finally:
            if is_new and identity_of(folder) == ours and all(path.name == _LOCK for path in folder.iterdir()):
                remove_tree(folder)
            if descriptor is not None:
                os.close(descriptor)
    finally:
        lock.release()


def was_left(folder: Path) -> bool:
    """Whether the process that used this folder is gone. False if that cannot be found out."""
    if fcntl is None:
        return False
    try:
        with (folder / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released when the file is closed
    except OSError:  # locked, or no lock file; some network file systems have no locks
        return False
    return True


@contextlib.contextmanager
def filled(folder: Path, *, last: str) -> Iterator[Path]:
    """Yield a folder to write in; at the end its files move to `folder`, not before.

    It lies inside `folder`, which may be a separate disk. Files that a killed process left there are removed.
    last  the file that shows others that the folder is complete; it is moved last
    Raises BlockingIOError if another process is filling the folder.
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
        with signals_wait():
            remove_tree(staging)
            if is_new:
                with contextlib.suppress(OSError):  # not empty: the files were written
                    folder.rmdir()
            if lock is not None:
                os.close(lock)


def _locked(folder: Path) -> int | None:
    """Lock a folder against other processes; returns its descriptor, or None if the system cannot lock folders."""
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
    """A temporary folder, removed by `remove` or at exit; that of a killed process is removed when the next is created.

    kind  beginning of its name, the same for all folders of one use
    """

    def __init__(self, kind: str) -> None:
        _remove_orphans(kind)
        self._lock: int | None = None
        while not self._is_made(kind):
            pass

    def _is_made(self, kind: str) -> bool:
        """Create and lock the folder; False if another process mistook it for an orphan in between."""
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
        with signals_wait():
            self._folder.cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_orphans(kind: str) -> None:
    """Remove this user's temporary folders of a kind that no process has locked; a killed process loses its locks."""
    if fcntl is None:
        return
    for folder in Path(tempfile.gettempdir()).glob(f"{kind}*"):
        with contextlib.suppress(OSError):  # another user's, locked, or already gone
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            opened = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(folder)
            finally:
                os.close(opened)


@contextlib.contextmanager
def scratch_folder(kind: str, *, within: Path | None = None) -> Iterator[Path]:
    """Yield a new folder that is removed at the end, also if a stop signal comes meanwhile.

    kind    beginning of its name
    within  where it is; None: among the temporary files
    """
    folder = Path(tempfile.mkdtemp(dir=within, prefix=kind))
    try:
        yield folder
    finally:
        remove_tree(folder)


def publish(staging: Path, folder: Path, *, last: str) -> None:
    """Move the files of a staged folder into another one, each with a rename. Others wait for `last`, so it is last."""
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


def identity_of(folder: Path) -> tuple[int, int] | None:
    """(device, inode) of a folder, which differ if another folder replaces it; None if there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def new_folder(path: Path) -> None:
    """Create an empty folder, and remove whatever had this name before."""
    remove_tree(path)
    path.mkdir(parents=True)


def open_to_umask(folder: Path) -> None:
    """Give every file the permissions of an ordinary new file; safetensors lets only the owner read its files.

    File systems without permissions, such as FAT and some network mounts, refuse; everyone may read their files anyway.
    """
    mask = os.umask(0o077)  # the mask can only be read by setting another one
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with contextlib.suppress(PermissionError):
                file.chmod(0o666 & ~mask)


def sync_tree(folder: Path) -> None:
    """Sync a folder and everything in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
