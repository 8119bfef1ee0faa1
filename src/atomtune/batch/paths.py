"""Paths: the tokens of a row from the start of a tree down to a segment, as few stretches.

A segment's queries see its path and the segment itself (docs/geometry.md); blocks and spans are made from both.
"""

from collections.abc import Sequence

import torch

from atomtune.batch.row import Segment

#: Tokens of a row: a stretch of it, or their indices where they do not stand together.
Where = slice | torch.Tensor
#: Tokens start..end of a row.
Stretch = tuple[int, int]


def path_to(parts: Sequence[Segment], number: int) -> list[Stretch]:
    """The stretches from the start of the row's tree down to segment `number`; touching ones joined."""
    path: list[Stretch] = []
    while number >= 0:
        start, end = parts[number].start, parts[number].end
        if path and path[-1][0] == end:
            end = path.pop()[1]
        path.append((start, end))  # from below to above
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


def where(stretches: Sequence[Stretch], filling: int, tokens: int) -> Where | None:
    """These stretches and `filling` more tokens, whichever are at hand, of a row of `tokens`."""
    if not stretches:
        return None
    start, end = stretches[-1]
    if len(stretches) == 1 and end + filling <= tokens:
        return slice(start, end + filling)
    return torch.cat([*(torch.arange(*stretch) for stretch in stretches), torch.zeros(filling, dtype=torch.long)])
