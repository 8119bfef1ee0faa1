"""Paths: the tokens from the start of a tree down to a segment, as a few stretches of the row.

The queries of a segment see the path above it and the segment itself (docs/geometry.md).
"""

from collections.abc import Sequence

from atomtune.batch.row import Segment

#: (start, end) of tokens of a row, end exclusive.
Stretch = tuple[int, int]


def path_to(parts: Sequence[Segment], number: int) -> list[Stretch]:
    """The stretches from the root of the tree down to segment `number`, inclusive; adjacent ones are merged."""
    path: list[Stretch] = []
    while number >= 0:
        start, end = parts[number].start, parts[number].end
        if path and path[-1][0] == end:
            end = path.pop()[1]
        path.append((start, end))  # from the segment up to the root
        number = parts[number].parent
    return path[::-1]


def last_of(path: Sequence[Stretch], count: int) -> list[Stretch]:
    """The last `count` tokens of a path."""
    tail: list[Stretch] = []
    for start, end in reversed(path):
        if count > 0:
            tail.append((max(start, end - count), end))
            count -= end - start
    return tail[::-1]


def split_at(path: Sequence[Stretch], count: int) -> tuple[list[Stretch], list[Stretch]]:
    """The first `count` tokens of a path, and the others."""
    first: list[Stretch] = []
    others: list[Stretch] = []
    for start, end in path:
        middle = min(end, start + max(count, 0))
        first += [(start, middle)] if middle > start else []
        others += [(middle, end)] if end > middle else []
        count -= end - start
    return first, others
