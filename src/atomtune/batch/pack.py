"""Packing: examples one after another in one row, nothing shared and nothing padded.

By the law of row.py, no example sees another, and each begins at position 0:

    ids       a0 a1 a2 b0 b1
    parent    -1  0  1 -1  3
    until      3  3  3  5  5
    position   0  1  2  0  1

No torch here.
"""

from collections.abc import Sequence

from atomtune.batch.row import Row, single
from atomtune.data.records import Example


def pack(examples: Sequence[Example]) -> Row:
    """All examples in one row, each as a chain of its own."""
    ids: list[int] = []
    parents: list[int] = []
    untils: list[int] = []
    learn: list[int] = []
    for example in examples:
        chain, start = single(example), len(ids)
        ids += chain.ids
        parents += [parent + start if parent >= 0 else -1 for parent in chain.parent]
        untils += [until + start for until in chain.until]
        learn += chain.learn
    return Row(tuple(ids), tuple(parents), tuple(untils), tuple(learn), tuple(example.origin for example in examples))
