"""Example table: the Examples of records as rows of an Arrow table, and back.

A row is a record with all its Examples. They are drawn together, so that their shared prefix is computed once.
"""

import hashlib
import itertools
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy
import pyarrow
from numpy.typing import NDArray

from atomtune.data.records import Example

FEATURES = datasets.Features(
    {
        "ids": datasets.List(datasets.Value("int32")),  # of all the record's Examples, concatenated
        "learn": datasets.List(datasets.Value("int8")),
        "ends": datasets.List(datasets.Value("int32")),  # end of each Example in ids, exclusive
        "origin": datasets.Value("string"),
        "length": datasets.Value("int32"),  # len(ids); read by the Trainer's group_by_length sampling
        "digest": datasets.Value("int64"),  # hash of ids, learn and ends, to count copies
    }
)


def copies_in(examples: datasets.Dataset) -> int:
    """The number of rows that are equal to an earlier row. Memory: 8 bytes per row."""
    digests = examples.with_format("numpy")["digest"][:]
    return len(digests) - len(numpy.unique(digests))


def as_table(records: Sequence[tuple[Example, ...]]) -> pyarrow.Table:
    """The Examples of R records as R rows of the cache."""
    examples = [example for record in records for example in record]
    # array and bytes convert Python integers more than three times as fast as numpy.
    ids = array("i", itertools.chain.from_iterable(example.ids for example in examples))
    marks = b"".join([bytes(example.learn) for example in examples])
    tokens = numpy.frombuffer(ids, dtype=numpy.int32)  # [T], T tokens in all records together
    learn = numpy.frombuffer(marks, dtype=numpy.int8)  # [T]
    ends = [list(itertools.accumulate(len(example.ids) for example in record)) for record in records]
    lengths = [record_ends[-1] for record_ends in ends]
    bounds = numpy.cumsum([0, *lengths], dtype=numpy.int32)  # [R + 1]
    arrays = [
        pyarrow.ListArray.from_arrays(bounds, tokens),
        pyarrow.ListArray.from_arrays(bounds, learn),
        pyarrow.array(ends, pyarrow.list_(pyarrow.int32())),
        pyarrow.array([record[0].origin for record in records], pyarrow.string()),
        pyarrow.array(lengths, pyarrow.int32()),
        pyarrow.array(_digests(tokens, learn, bounds, ends), pyarrow.int64()),
    ]
    return pyarrow.Table.from_arrays(arrays, schema=FEATURES.arrow_schema)


def _digests(
    tokens: NDArray[numpy.int32],
    learn: NDArray[numpy.int8],
    bounds: NDArray[numpy.int32],
    ends: Sequence[Sequence[int]],
) -> list[int]:
    """A 64-bit hash for each row, of its ids, learn marks and ends.

    tokens  [T]      ids of all rows, concatenated
    learn   [T]      their learn marks
    bounds  [R + 1]  row r is tokens[bounds[r]:bounds[r + 1]]
    ends    [R]      for each row, the end of each Example within the row
    Returns [R] signed integers.
    """
    digests = []
    for (start, end), row_ends in zip(itertools.pairwise(bounds.tolist()), ends, strict=True):
        content = hashlib.blake2b(tokens[start:end].tobytes(), digest_size=8)
        content.update(learn[start:end].tobytes() + bytes(str(row_ends), "ascii"))
        digests.append(int.from_bytes(content.digest(), "big", signed=True))
    return digests


def as_examples(row: Mapping[str, Any]) -> tuple[Example, ...]:
    """The Examples of a row of the cache."""
    # ids   1 5 6 7 1 5 8      the record's Examples, concatenated
    # ends        4     7      end of each, exclusive
    ids, learn, origin = row["ids"], row["learn"], row["origin"]
    examples = []
    for start, end in itertools.pairwise([0, *row["ends"]]):
        examples.append(Example(tuple(ids[start:end]), tuple(learn[start:end]), origin))
    return tuple(examples)
