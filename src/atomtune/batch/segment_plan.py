"""Segment plans: how layers that carry a state from token to token compute a row with branches.

There are two methods (`MixerMethod`). fork: the row is cut into segments at its branches. A segment starts from the
final state of its parent segment, so the state is forked at a branch; a root starts without a state. Segments that can
run together form a batch. Padding is at the end of a segment, where it changes no result, and never in a segment from
which others start.

    tokens    p p p p a a a b b          segments   0: p p p p    1: a a a, of 0    2: b b, of 0
    batch 0   p p p p                    starts empty, ends in state s
    batch 1   a a a                      both start from s
              b b b'                     b' is padding

paths: layers that cannot start from a state compute every path from root to leaf; a token's result is taken from the
first path that contains it.
Letters: T tokens in the row, G segments in a batch, n the longest of them, P paths, L the longest of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from atomtune.batch.paths import path_to
from atomtune.batch.row import Row, Segment, segments

#: How layers that carry a state compute a row: by a SegmentPlan or by a PathPlan.
MixerMethod = Literal["fork", "paths"]
#: Leaves share a batch if the longest has at most 1.5 times as many tokens as the shortest, or at most 16 more.
_LONGER = 1.5
_LONGER_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SegmentBatch:
    """Segments that are computed as one batch of sequences.

    tokens    [G, n]  index in the row of each token; a segment's last token is repeated as padding
    places    [K]     the places, in [G * n], of the segments' own tokens
    parents   for each segment, (batch, sequence in it) of the segment whose final state it starts from; empty for roots
    """

    tokens: torch.Tensor
    places: torch.Tensor
    parents: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """A row for layers that start from a state.

    batches   every parent comes before its children
    order     [T]  index of each token's result in the concatenated `places` of all batches
    """

    batches: tuple[SegmentBatch, ...]
    order: torch.Tensor


@dataclass(frozen=True, slots=True)
class PathPlan:
    """A row for layers that start without a state.

    paths     [P, L]  the tokens of every path from root to leaf; the last one is repeated as padding
    first_on  [T]     the first place of each token, in [P * L]
    """

    paths: torch.Tensor
    first_on: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Run:
    """How one segment is computed: which tokens are run again before its own, and from which state it starts."""

    again: tuple[int, ...]
    own: range
    parent: int  # the segment whose final state it starts from, or -1
    is_inner: bool  # other segments start from its final state, so it may not be padded

    def __len__(self) -> int:
        return len(self.again) + len(self.own)


def plan_segments(row: Row) -> SegmentPlan:
    """Plan the batches of a row's segments."""
    runs = _runs(segments(row))
    groups = list(_groups(runs))
    where = {number: (g, i) for g, group in enumerate(groups) for i, number in enumerate(group)}
    batches: list[SegmentBatch] = []
    computed: list[int] = []  # the tokens of the row in the order of the batches' results
    for group in groups:
        members = [runs[number] for number in group]
        parents = tuple(where[run.parent] for run in members if run.parent >= 0)
        batches.append(_batch(members, parents))
        for run in members:
            computed += run.own
    order = torch.empty(len(row), dtype=torch.long)
    order[torch.tensor(computed)] = torch.arange(len(row))
    return SegmentPlan(tuple(batches), order)


def plan_paths(row: Row) -> PathPlan:
    """Plan the paths of a row."""
    parts = segments(row)
    inner = {part.parent for part in parts}
    paths: list[list[int]] = []
    for leaf in range(len(parts)):
        if leaf not in inner:
            paths.append([token for start, end in path_to(parts, leaf) for token in range(start, end)])
    longest = max(map(len, paths))
    first_on = torch.empty(len(row), dtype=torch.long)
    for number in reversed(range(len(paths))):  # reversed, so that the first path overwrites the others
        first_on[torch.tensor(paths[number])] = number * longest + torch.arange(len(paths[number]))
    return PathPlan(torch.tensor([path + [path[-1]] * (longest - len(path)) for path in paths]), first_on)


def _batch(runs: Sequence[_Run], parents: tuple[tuple[int, int], ...]) -> SegmentBatch:
    """A batch of segments, each padded at its end with its own last token.

    again a, own b    a b b b .     only the b's are results; a was computed before, "." is padding
    """
    width = max(len(run) for run in runs)
    if not runs[0].is_inner:
        width = max(width, 2)  # with a single token a mixer would switch to its decoding code (see _runs)
    tokens: list[list[int]] = []
    places: list[int] = []
    for i, run in enumerate(runs):
        sequence = [*run.again, *run.own]
        padding = [sequence[-1]] * (width - len(sequence))
        tokens.append(sequence + padding)
        first = i * width
        places += range(first + len(run.again), first + len(run))
    return SegmentBatch(torch.tensor(tokens), torch.tensor(places), parents)


def _runs(parts: Sequence[Segment]) -> list[_Run]:
    """How each segment is computed.

    A mixer that gets a single token and a state switches to its decoding code, which often changes the state in place.
    So an inner segment of one token is computed like a leaf, padded to two tokens; its children start from its parent's
    state and run its token again.
    """
    inner = {part.parent for part in parts}
    single = [i in inner and len(part) == 1 and part.parent >= 0 for i, part in enumerate(parts)]
    runs = []
    for i, part in enumerate(parts):
        again: tuple[int, ...] = ()
        parent = part.parent
        while parent >= 0 and single[parent]:
            again = (parts[parent].start, *again)
            parent = parts[parent].parent
        runs.append(_Run(again, range(part.start, part.end), parent, i in inner and not single[i]))
    return runs


def _groups(runs: Sequence[_Run]) -> Iterable[list[int]]:
    """Groups of segments that run together: inner ones of equal depth and length, then leaves of similar length."""
    depth: list[int] = []
    for run in runs:
        depth.append(0 if run.parent < 0 else depth[run.parent] + 1)
    inner: dict[tuple[int, int], list[int]] = {}
    for number, run in enumerate(runs):
        if run.is_inner:
            inner.setdefault((depth[number], len(run)), []).append(number)
    for _, group in sorted(inner.items()):
        yield group
    for at_root in (True, False):
        group = []
        leaves = [number for number, run in enumerate(runs) if not run.is_inner and (run.parent < 0) == at_root]
        for number in sorted(leaves, key=lambda number: len(runs[number])):
            shortest = len(runs[group[0]]) if group else 0
            if group and len(runs[number]) > max(_LONGER * shortest, shortest + _LONGER_TOKENS):
                yield group
                group = []
            group.append(number)
        if group:
            yield group
