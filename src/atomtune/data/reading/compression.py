"""Compression: the bytes of a file, decompressed while reading if its first bytes are those of gzip or zstd.

Memory is bounded by one buffer. zstd comes from pyarrow, which `datasets` needs anyway.
"""

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO, Literal

import pyarrow

from atomtune.errors import BadData

#: Read from the disk or decompressed at once.
BUFFER_BYTES = 256 * 2**10
#: Decompressed in one step. A step that hits the end of a truncated file returns nothing, so the line in the error is
#: exact to one step.
STEP_BYTES = 64 * 2**10
GZIP = b"\x1f\x8b"
#: A frame of data, or one of the sixteen frames that a reader skips: pzstd begins a file with such a frame.
ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes([number]) + b"\x2a\x4d\x18" for number in range(0x50, 0x60)))
ENDINGS = (".gz", ".zst")
Compression = Literal["gzip", "zstd"]
#: Text by people compresses to a fifth, by machines to a fiftieth. A file that grows more than 200 times, and beyond
#: FREE_BYTES, is refused: a few kilobytes could otherwise keep the reader busy for hours.
MOST_GROWTH = 200
FREE_BYTES = 256 * 2**20


def ending_of(path: Path) -> str:
    """The file's extension in lower case, without .gz or .zst: `.csv` of `train.csv.gz`."""
    if path.suffix.lower() in ENDINGS:
        path = path.with_suffix("")
    return path.suffix.lower()


def compression_of(head: bytes) -> Compression | None:
    """How a file is compressed, detected from its first bytes; None if it is not."""
    if head.startswith(GZIP):
        return "gzip"
    return "zstd" if head.startswith(ZSTD) else None


class _AsOpened(io.FileIO):
    """A file up to the size it had when it was opened: one that grows faster than it is read would never end.

    cache.py compares the size before and after, and reports that it grew.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._end = os.fstat(self.fileno()).st_size

    def readinto(self, buffer: Any) -> int | None:
        left = max(0, self._end - self.tell())
        return super().readinto(memoryview(buffer)[:left])


def open_raw(path: Path) -> io.FileIO:
    """Open the file without decompression, up to its present size. Raises BadData if it cannot be opened."""
    try:
        return _AsOpened(path)
    except OSError as error:
        raise BadData(f"{path}: cannot be read: {error.strerror}.") from None


@contextmanager
def open_bytes(path: Path, advance: Callable[[int], None] = lambda n_bytes: None, *, name: str) -> Iterator[BinaryIO]:
    """The decompressed content of a file as a stream.

    advance  called with the number of bytes read from the disk, before decompression
    name     of the file in messages
    Raises BadData if the file cannot be opened; reading raises it where the file is damaged or ends early, and if it
    unpacks to more than MOST_GROWTH times its size.
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
        yield io.BufferedReader(_Watched(unpacked, name, compression, most_bytes), BUFFER_BYTES)


def _unpacked(counted: io.RawIOBase, compression: Compression) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=io.BufferedReader(counted, BUFFER_BYTES))
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(counted, mode="r"), "zstd")


class _Counted(io.RawIOBase):
    """A file that reports how many bytes of it were read."""

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
    """Decompressed bytes; reading raises BadData with the line number if the archive is damaged or grows too much."""

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
            command = f"{self._compression} -t {quote(self._name)}"
            raise BadData(
                f"{self._name}:{self._line}: the {self._compression} file {what}. Download or compress it "
                f"again; {command} tests it."
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
