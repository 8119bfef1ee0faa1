"""Columns: the rows of a Parquet or Arrow file as objects, a batch at a time.

Before: a path.  After: formats.py turns each value into a Record.
Lists and structs become Python lists and dicts; what is no text (bytes, images, times) stays what it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import Refusal, RefusalKind
from atomtune.errors import BadData

#: Rows that are Python objects at once.
BATCH_ROWS = 1000
ARROW_MAGIC = b"ARROW1"


def read_parquet(path: Path, name: str, advance: Callable[[int], None]) -> Iterator[list[RawRecord | Refusal]]:
    """The rows of a Parquet file in batches; advance is called with their share of the file's bytes."""
    with explained(path, "Parquet"), path.open("rb") as raw:
        # Without pre_buffer a row group is read page by page, as it is used; with it, whole.
        file = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
        batches = file.iter_batches(batch_size=BATCH_ROWS, use_threads=False)  # other processes may be forked
        yield from read_batches(batches, name, _share(path.stat().st_size, file.metadata.num_rows, advance))


def read_arrow(path: Path, name: str, advance: Callable[[int], None]) -> Iterator[list[RawRecord | Refusal]]:
    """The rows of an Arrow IPC file or stream in batches; advance is called with bytes read."""
    told = 0
    with explained(path, "Arrow"), path.open("rb") as raw:

        def tell(n_rows: int) -> None:
            nonlocal told
            told, before = raw.tell(), told
            advance(told - before)

        yield from read_batches(checked(_record_batches(raw)), name, tell)
    advance(path.stat().st_size - told)


def _record_batches(raw: BinaryIO) -> Iterator[pyarrow.RecordBatch]:
    """The batches of a file (which begins with a magic word) or of a stream."""
    if raw.read(len(ARROW_MAGIC)) == ARROW_MAGIC:
        reader = pyarrow.ipc.open_file(raw)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        raw.seek(0)
        yield from pyarrow.ipc.open_stream(raw)


def checked(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    """The batches of an Arrow file, whose memory is used as it stands in the file: offsets must point into it."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def read_batches(
    batches: Iterator[pyarrow.RecordBatch], name: str, count: Callable[[int], None]
) -> Iterator[list[RawRecord | Refusal]]:
    """The rows of batches as Python values, numbered from 1; count is called with the rows of each batch.

    Raises pyarrow's errors for damaged data, BadData for a column that stands twice.
    """
    first = 1
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            twice = next(one for one in names if names.count(one) > 1)
            raise BadData(f'{name}: column "{twice}" stands twice. Rename or remove one.')
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield _rows(batch.slice(start, BATCH_ROWS), name, first + start)
        first += batch.num_rows
        count(batch.num_rows)


def _rows(batch: pyarrow.RecordBatch, name: str, first: int) -> list[RawRecord | Refusal]:
    try:
        return [RawRecord(value, f"{name}:{number}") for number, value in enumerate(batch.to_pylist(), first)]
    except ValueError:  # of one row; which one, is seen when each is taken alone
        return [_row(batch.slice(i, 1), f"{name}:{first + i}") for i in range(batch.num_rows)]


def _row(batch: pyarrow.RecordBatch, origin: str) -> RawRecord | Refusal:
    try:
        return RawRecord(batch.to_pylist()[0], origin)
    except UnicodeDecodeError as error:
        return Refusal(
            origin,
            f"a text that is not UTF-8 at byte {error.start + 1}; write the file again with UTF-8",
            RefusalKind.UNREADABLE,
        )
    except ValueError as error:
        return Refusal(origin, f"a value that cannot be read: {error}", RefusalKind.UNREADABLE)


def _share(size: int, rows: int, advance: Callable[[int], None]) -> Callable[[int], None]:
    """Turns rows into their share of the bytes, so that all rows make all bytes."""
    read = 0

    def count(n_rows: int) -> None:
        nonlocal read
        advance(size * (read + n_rows) // rows - size * read // rows)
        read += n_rows

    return count


@contextmanager
def explained(path: Path, kind: str) -> Iterator[None]:
    """Turn what pyarrow raises into a BadData that says what to do."""
    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        # A name of a column may be no UTF-8, and a length in the file may ask for all memory there is.
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadData(
            f"{path}: {kind} that cannot be read: {why.rstrip('.')}.\nThe file is damaged or was not written to its "
            "end: fetch or write it again."
        ) from None
