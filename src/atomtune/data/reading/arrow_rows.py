"""Arrow rows: the rows of a Parquet or Arrow file as Python objects, read in batches.

Lists and structs become Python lists and dicts; other values (bytes, images, times) keep their Python type.
Arrow gives a struct all its keys in every row, with null for those a record did not have: such nulls are dropped. A
null in a column, a list, a map or a JSON text is the record's own and stays.
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
from atomtune.limits import try_in_child_process

#: Rows converted to Python objects at once.
BATCH_ROWS = 1000
ARROW_MAGIC = b"ARROW1"
#: Errors of pyarrow for a value that Python cannot represent: a time in the year 300,000, or in an unknown time zone.
_NO_VALUE = (ValueError, ArithmeticError, LookupError)


def read_parquet(path: Path, name: str, advance: Callable[[int], None]) -> Iterator[list[RawRecord | Refusal]]:
    """The rows of a Parquet file in batches. Raises BadData if it is damaged.

    advance  called with each batch's share of the file's bytes
    """
    with explained(path, "Parquet"), path.open("rb") as raw:
        # Without pre_buffer, a row group is read page by page when needed; with it, all at once.
        file = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
        # Damaged metadata may crash the process: pyarrow throws a C++ exception about column sizes that nobody catches.
        if tripped := try_in_child_process(lambda _say: _refuse_swollen(file.metadata, name)):
            raise BadData(
                f"{path} cannot be read as Parquet: reading its metadata {tripped.words}. Write the file again."
            )
        _refuse_swollen(file.metadata, name)
        batches = file.iter_batches(batch_size=BATCH_ROWS, use_threads=False)  # the process may fork workers
        size = path.stat().st_size
        yield from read_batches(batches, name, size, in_bytes(size, file.metadata.num_rows, advance))


def _refuse_swollen(metadata: pyarrow.parquet.FileMetaData, name: str) -> None:
    """Raise BadData for a column with a highly compressed dictionary, whose values each row repeats in memory.

    A file of one kilobyte can hold a value of eight megabytes and refer to it a thousand times in one batch.
    """
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            swollen = chunk.total_uncompressed_size > max(LONGEST_LINE, MOST_GROWTH * chunk.total_compressed_size)
            if swollen and chunk.has_dictionary_page:
                raise BadData(
                    f'{name}: column "{chunk.path_in_schema}" unpacks to more than {MOST_GROWTH} times its size, which '
                    "no real data does. If the data are right, write the file again without dictionary encoding."
                )


def read_arrow(path: Path, name: str, advance: Callable[[int], None]) -> Iterator[list[RawRecord | Refusal]]:
    """The rows of an Arrow IPC file or stream in batches. Raises BadData if it is damaged.

    advance  called with the number of bytes read since the last call
    """
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
    """The record batches of an IPC file, which begins with ARROW_MAGIC, or of a stream."""
    if raw.read(len(ARROW_MAGIC)) == ARROW_MAGIC:
        reader = pyarrow.ipc.open_file(raw)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        raw.seek(0)
        yield from pyarrow.ipc.open_stream(raw)


def checked(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    """Validate each batch: Arrow uses the file's bytes as they are, so a bad offset would read outside of them."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def read_batches(
    batches: Iterator[pyarrow.RecordBatch], name: str, size: int, count: Callable[[int], None]
) -> Iterator[list[RawRecord | Refusal]]:
    """The rows of the batches as Python objects, at most BATCH_ROWS at once, numbered from 1 in their origins.

    size   bytes of the file or files
    count  called with the number of rows after each batch
    Raises pyarrow's errors for damaged data; BadData for a repeated column, too deep nesting, or rows that take more
    than MOST_GROWTH times the file's size.
    """
    first, unpacked = 1, 0
    for batch in batches:
        unpacked += sum(map(_bytes_of, batch.columns))
        if unpacked > max(FREE_BYTES, MOST_GROWTH * size):
            raise BadData(
                f"{name}:{first}: the rows take more than {MOST_GROWTH} times the file's size, more than real data "
                "does. If the data are right, write the file again without dictionary encoding."
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
    """The bytes of a column's values with repetitions written out: Arrow may store a text once for a million rows."""
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
    except pyarrow.ArrowNotImplementedError:  # the dictionary holds numbers or lists, not texts
        return len(indices) * int(values.nbytes // max(len(values), 1))
    return int(pyarrow.compute.sum(lengths.take(indices)).as_py() or 0)


def _repeats(kind: pyarrow.DataType) -> bool:
    """Whether a type is stored with repetitions left out (dictionary or run-end encoding), at any depth."""
    if pyarrow.types.is_dictionary(kind) or pyarrow.types.is_run_end_encoded(kind):
        return True
    if pyarrow.types.is_struct(kind):
        return any(_repeats(field.type) for field in kind)
    return _is_list(kind) and _repeats(kind.value_type)


def _rows(batch: pyarrow.RecordBatch, name: str, first: int) -> list[RawRecord | Refusal]:
    try:
        return [RawRecord(row, f"{name}:{number}") for number, row in enumerate(_as_python(batch), first)]
    except _NO_VALUE:  # one row is at fault: convert them one by one to find it
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
    """The rows as Python objects, without the nulls that Arrow adds to structs."""
    rows: list[dict[str, Any]] = batch.to_pylist()
    for column in batch.schema:
        if _holds_struct(column.type):
            for row in rows:
                row[column.name] = _without_filling(row[column.name], column.type)
    return rows


def _is_deep(kind: pyarrow.DataType) -> bool:
    """Whether a type nests lists and structs more than MOST_LEVELS deep."""
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
    """The value without the struct keys, at any depth, whose value is null."""
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


def in_bytes(size: int, rows: int, advance: Callable[[int], None]) -> Callable[[int], None]:
    """A callback that converts a number of rows to bytes for `advance`; all rows together give all bytes."""
    rows_read = 0

    def count(n_rows: int) -> None:
        nonlocal rows_read
        bytes_before = size * rows_read // max(rows, 1)  # damaged metadata may say 0 rows
        rows_read += n_rows
        advance(size * rows_read // max(rows, 1) - bytes_before)

    return count


@contextmanager
def explained(path: Path, kind: str) -> Iterator[None]:
    """Turn pyarrow's errors into a BadData that says what to do."""
    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        # UnicodeDecodeError: a column name that is not UTF-8; MemoryError: a damaged length in the file.
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadData(
            f"{path}: {kind} that cannot be read: {why.rstrip('.')}.\nThe file is damaged or incomplete: download or "
            "write it again."
        ) from None
