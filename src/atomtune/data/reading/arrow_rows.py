"""Arrow rows: the rows of a Parquet or Arrow file as objects, a batch at a time.

Lists and structs become Python lists and dicts; what is no text (bytes, images, times) stays what it is.
A struct has every key in every row, and a null where a record had no such key: such nulls are dropped. A null in a
column, in a list, in a map or in a text of JSON is the record's own and stays.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from atomtune.data.reading.compression import FREE_BYTES, MOST_GROWTH
from atomtune.data.reading.raw import LONGEST_LINE, MOST_LEVELS, TOO_DEEP, RawRecord
from atomtune.data.records import Refusal, RefusalKind
from atomtune.errors import BadData
from atomtune.limits import try_apart

#: Rows that are Python objects at once.
BATCH_ROWS = 1000
ARROW_MAGIC = b"ARROW1"
#: What pyarrow raises for a value that Python has none for: a time in the year 300,000, or in a zone that nobody knows.
_NO_VALUE = (ValueError, ArithmeticError, LookupError)


def read_parquet(path: Path, name: str, advance: Callable[[int], None]) -> Iterator[list[RawRecord | Refusal]]:
    """The rows of a Parquet file in batches; advance is called with their share of the file's bytes."""
    with explained(path, "Parquet"), path.open("rb") as raw:
        # Without pre_buffer a row group is read page by page, as it is used; with it, whole.
        file = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
        # Damaged metadata may end the process: what pyarrow throws about a column's sizes, nobody catches.
        if tripped := try_apart(lambda _say: _refuse_swollen(file.metadata, name)):
            raise BadData(
                f"{path} cannot be read as Parquet: reading its metadata {tripped.words}. Write the file again."
            )
        _refuse_swollen(file.metadata, name)
        batches = file.iter_batches(batch_size=BATCH_ROWS, use_threads=False)  # other processes may be forked
        size = path.stat().st_size
        yield from read_batches(batches, name, size, _share(size, file.metadata.num_rows, advance))


def _refuse_swollen(metadata: pyarrow.parquet.FileMetaData, name: str) -> None:
    """Raises BadData for a dictionary of values that hardly take space in the file: each row repeats one in memory.

    A kilobyte may hold a value of eight megabytes and ask for it a thousand times in one batch.
    """
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            swollen = chunk.total_uncompressed_size > max(LONGEST_LINE, MOST_GROWTH * chunk.total_compressed_size)
            if swollen and chunk.has_dictionary_page:
                raise BadData(
                    f'{name}: column "{chunk.path_in_schema}" unpacks to more than {MOST_GROWTH} times its size, which '
                    "no real data does. Write the file again without dictionaries if it is right."
                )


def read_arrow(path: Path, name: str, advance: Callable[[int], None]) -> Iterator[list[RawRecord | Refusal]]:
    """The rows of an Arrow IPC file or stream in batches; advance is called with bytes read."""
    bytes_read = 0
    size = path.stat().st_size
    with explained(path, "Arrow"), path.open("rb") as raw:

        def count(n_rows: int) -> None:
            nonlocal bytes_read
            before, bytes_read = bytes_read, raw.tell()
            advance(bytes_read - before)

        yield from read_batches(checked(_record_batches(raw)), name, size, count)
    advance(size - bytes_read)


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
    batches: Iterator[pyarrow.RecordBatch], name: str, size: int, count: Callable[[int], None]
) -> Iterator[list[RawRecord | Refusal]]:
    """The rows of batches as Python values, numbered from 1; count is called with the rows of each batch.

    size  of the file or files, in bytes
    Raises pyarrow's errors for damaged data, BadData for a column that appears twice or rows that swell.
    """
    first, unpacked = 1, 0
    for batch in batches:
        unpacked += sum(map(_bytes_of, batch.columns))
        if unpacked > max(FREE_BYTES, MOST_GROWTH * size):
            raise BadData(
                f"{name}:{first}: the rows take more than {MOST_GROWTH} times the file's size, more than real data "
                "does. Write the file again without dictionaries if it is right."
            )
        for field in batch.schema:
            if _is_deep(field.type):
                raise BadData(f'{name}: column "{field.name}": {TOO_DEEP}.')
        for column, times in Counter(batch.schema.names).items():
            if times > 1:
                raise BadData(f'{name}: column "{column}" appears twice. Rename or remove one.')
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield _rows(batch.slice(start, BATCH_ROWS), name, first + start)
        first += batch.num_rows
        count(batch.num_rows)


def _bytes_of(column: pyarrow.Array) -> int:
    """What a column's values take one by one: an Arrow column may hold a text once and stand for it a million times."""
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        return _repeated(column.dictionary, column.indices)
    if pyarrow.types.is_run_end_encoded(kind):
        ends = column.run_ends.to_numpy()
        of_each = int(column.values.nbytes // max(len(column.values), 1))
        return int(ends[-1] - column.offset) * of_each if len(ends) else 0
    if pyarrow.types.is_struct(kind):
        return sum(_bytes_of(column.field(number)) for number in range(kind.num_fields))
    if _is_list(kind):
        return int(column.nbytes) if not _repeats(kind) else _bytes_of(column.flatten())
    return int(column.nbytes)


def _repeated(values: pyarrow.Array, indices: pyarrow.Array) -> int:
    try:
        lengths = pyarrow.compute.binary_length(values)
    except pyarrow.ArrowNotImplementedError:  # numbers, or lists
        return len(indices) * int(values.nbytes // max(len(values), 1))
    return int(pyarrow.compute.sum(lengths.cast("int64").take(indices)).as_py() or 0)


def _repeats(kind: pyarrow.DataType) -> bool:
    """Whether values inside may stand for many of themselves."""
    if pyarrow.types.is_dictionary(kind) or pyarrow.types.is_run_end_encoded(kind):
        return True
    if pyarrow.types.is_struct(kind):
        return any(_repeats(field.type) for field in kind)
    return _is_list(kind) and _repeats(kind.value_type)


def _rows(batch: pyarrow.RecordBatch, name: str, first: int) -> list[RawRecord | Refusal]:
    try:
        return [RawRecord(row, f"{name}:{number}") for number, row in enumerate(_as_python(batch), first)]
    except _NO_VALUE:  # of one row; which one, is seen when each is taken alone
        return [_row(batch.slice(i, 1), f"{name}:{first + i}") for i in range(batch.num_rows)]


def _row(batch: pyarrow.RecordBatch, origin: str) -> RawRecord | Refusal:
    try:
        return RawRecord(_as_python(batch)[0], origin)
    except UnicodeDecodeError as error:
        return Refusal(
            origin,
            f"a text that is not UTF-8 at byte {error.start + 1}; write the file again with UTF-8",
            RefusalKind.UNREADABLE,
        )
    except _NO_VALUE as error:
        return Refusal(origin, f"a value that cannot be read: {error}", RefusalKind.UNREADABLE)


def _as_python(batch: pyarrow.RecordBatch) -> list[dict[str, Any]]:
    """The rows as Python objects, without the nulls that structs were filled up with."""
    rows: list[dict[str, Any]] = batch.to_pylist()
    for column in batch.schema:
        if _holds_struct(column.type):
            for row in rows:
                row[column.name] = _without_filling(row[column.name], column.type)
    return rows


def _is_deep(kind: pyarrow.DataType) -> bool:
    """Whether lists and structs stand in each other more often than records may."""
    layer = [kind]
    for _ in range(MOST_LEVELS):
        inner: list[pyarrow.DataType] = []
        for outer in layer:
            if pyarrow.types.is_struct(outer):
                inner += [field.type for field in outer]
            elif _is_list(outer):
                inner.append(outer.value_type)
        layer = inner
    return bool(layer)


def _holds_struct(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_struct(kind):
        return True
    return _is_list(kind) and _holds_struct(kind.value_type)


def _is_list(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _without_filling(value: Any, kind: pyarrow.DataType) -> Any:
    """A value of this type without keys whose value is null."""
    if value is None:
        return None
    if pyarrow.types.is_struct(kind):
        filled = {}
        for field in kind:
            item = value[field.name]
            if item is not None:
                filled[field.name] = _without_filling(item, field.type)
        return filled
    if _is_list(kind) and _holds_struct(kind):
        return [_without_filling(item, kind.value_type) for item in value]
    return value


def _share(size: int, rows: int, advance: Callable[[int], None]) -> Callable[[int], None]:
    """Turns rows into their share of the bytes, so that all rows make all bytes."""
    rows_read = 0

    def count(n_rows: int) -> None:
        nonlocal rows_read
        bytes_before = size * rows_read // max(rows, 1)  # damaged metadata may count none
        rows_read += n_rows
        advance(size * rows_read // max(rows, 1) - bytes_before)

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
            f"{path}: {kind} that cannot be read: {why.rstrip('.')}.\nThe file is damaged or incomplete: download or "
            "write it again."
        ) from None
