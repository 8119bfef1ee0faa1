"""Compression: the bytes of a file, unpacked on the way where it is .gz or .zst, as its first bytes tell.

Never more than a buffer is unpacked at once. zstd is pyarrow's own, which `datasets` needs anyway.
"""

import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow

from atomtune.errors import BadData

#: Read from the disk, and unpacked, at once.
BUFFER_BYTES = 256 * 2**10
#: Unpacked in one step: a step that meets the end of half a file gives nothing, so the place is exact to one.
STEP_BYTES = 64 * 2**10
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
ENDINGS = (".gz", ".zst")
Compression = Literal["gzip", "zstd"]
#: Text of people packs to a fifth, of machines to a fiftieth. What grows more, and beyond the bytes below, is no data:
#: a few kilobytes could keep a reader busy for hours.
MOST_GROWTH = 200
FREE_BYTES = 256 * 2**20


def ending_of(path: Path) -> str:
    """The ending that says what a file holds: `.csv` of `train.csv.gz`."""
    if path.suffix.lower() in ENDINGS:
        path = path.with_suffix("")
    return path.suffix.lower()


def compression_of(head: bytes) -> Compression | None:
    """How a file is compressed, by its first bytes."""
    if head.startswith(GZIP):
        return "gzip"
    return "zstd" if head.startswith(ZSTD) else None


class _AsOpened(io.FileIO):
    """A file up to where it ended when it was opened: one that grows faster than it is read has no end.

    That it grew is said by who compares its size before and after (cache.py).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        status = os.fstat(self.fileno())
        self._end = status.st_size if stat.S_ISREG(status.st_mode) else None  # a pipe ends where its writer does

    def readinto(self, buffer: Any) -> int | None:
        if self._end is None:
            return super().readinto(buffer)
        left = max(0, self._end - self.tell())
        return super().readinto(memoryview(buffer)[:left])


def open_raw(path: Path) -> io.FileIO:
    """The file as it is, and as long as it is now. Raises BadData when it cannot be opened."""
    try:
        return _AsOpened(path)
    except OSError as error:
        raise BadData(f"{path}: cannot be read: {error.strerror}.") from None


@contextmanager
def open_bytes(
    path: Path, advance: Callable[[int], None] = lambda n_bytes: None, *, name: str = ""
) -> Iterator[BinaryIO]:
    """The content of a file as a stream; advance is called with bytes read from the disk, packed ones where packed.

    name  the file's in messages, where it is not its own

    Raises BadData when the file cannot be opened; reading raises it at a damaged or unfinished place.
    """
    with open_raw(path) as raw:
        counted = _Counted(raw, advance)
        compression = compression_of(raw.read(4))
        raw.seek(0)
        if compression is None:
            yield io.BufferedReader(counted, BUFFER_BYTES)
            return
        unpacked = _unpacked(counted, compression)
        most_bytes = max(FREE_BYTES, MOST_GROWTH * path.stat().st_size)
        yield io.BufferedReader(_Watched(unpacked, name or path.name, compression, most_bytes), BUFFER_BYTES)


def _unpacked(counted: io.RawIOBase, compression: Compression) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=io.BufferedReader(counted, BUFFER_BYTES))
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(counted, mode="r"), "zstd")


class _Counted(io.RawIOBase):
    """A file that says how much of it was read."""

    def __init__(self, file: io.FileIO, advance: Callable[[int], None]) -> None:
        self._file, self._advance = file, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n_bytes = self._file.readinto(buffer) or 0
        if n_bytes:
            self._advance(n_bytes)
        return n_bytes


class _Watched(io.RawIOBase):
    """Unpacked bytes; what is wrong with the archive is said with the line that is reached."""

    def __init__(self, unpacked: Any, name: str, compression: Compression, most_bytes: int) -> None:
        self._unpacked, self._name, self._compression = unpacked, name, compression
        self._most_bytes, self._bytes = most_bytes, 0
        self._line = 1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            part: bytes = self._unpacked.read(min(len(buffer), STEP_BYTES))
        except (EOFError, OSError, zlib.error) as error:  # gzip.BadGzipFile and pyarrow's errors are OSErrors
            unfinished = isinstance(error, EOFError) or "Truncated" in str(error)
            what = "ends in the middle, like an interrupted download" if unfinished else f"is damaged ({error})"
            command = "gzip -t" if self._compression == "gzip" else "zstd -t"
            raise BadData(
                f"{self._name}:{self._line}: the {self._compression} file {what}. Download or compress it "
                f"again; {command} {self._name} tests it."
            ) from None
        self._bytes += len(part)
        if self._bytes > self._most_bytes:
            raise BadData(
                f"{self._name}:{self._line}: the {self._compression} file unpacks to more than {MOST_GROWTH} times its "
                "size, more than real data does. If that is right, unpack it yourself."
            )
        self._line += part.count(b"\n")
        buffer[: len(part)] = part
        return len(part)
