"""Packing: examples one after another in one row, nothing shared and nothing padded.

By the law of row.py, no example sees another, and each begins at position 0:

    ids       a0 a1 a2 b0 b1
    parent    -1  0  1 -1  3
    until      3  3  3  5  5
    position   0  1  2  0  1

No torch here.
"""

from collections.abc import Sequence
from itertools import accumulate

from atomtune.batch.row import Row, single
from atomtune.data.records import Example


def pack(examples: Sequence[Example]) -> Row:
    """All examples in one row, each as a chain of its own."""
    chains = [single(example) for example in examples]
    begins = list(accumulate(map(len, chains), initial=0))[:-1]
    placed = list(zip(chains, begins, strict=True))
    return Row(
        ids=tuple(token for chain in chains for token in chain.ids),
        parent=tuple(parent + begin if parent >= 0 else -1 for chain, begin in placed for parent in chain.parent),
        until=tuple(until + begin for chain, begin in placed for until in chain.until),
        learn=tuple(times for chain in chains for times in chain.learn),
        origins=tuple(origin for chain in chains for origin in chain.origins),
    )
