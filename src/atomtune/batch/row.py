"""Rows: where every token of a batch stands, and whom it may see.

Law: token q sees token k exactly when k <= q < until[k]; token i is predicted from the hidden state of parent[i] and
counted learn[i] times. There is no label shift anywhere.
No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from atomtune.data.records import Example


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens in depth-first order.

    parent[i]  index of the token before i on its own path, -1 at a start
    until[i]   one past the end of the subtree that hangs on i
    learn[i]   how often i is a target
    origins    the records that lie in this row
    """

    ids: tuple[int, ...]
    parent: tuple[int, ...]
    until: tuple[int, ...]
    learn: tuple[int, ...]
    origins: tuple[str, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.parent), len(self.until), len(self.learn)}
        assert len(lengths) == 1, f"a row's columns differ in length: {lengths}"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_chain(self) -> bool:
        """One path from the first token to the last, as stock attention masks have it."""
        return all(parent == i - 1 for i, parent in enumerate(self.parent))

    def positions(self) -> tuple[int, ...]:
        """Depth of each token along its own path."""
        depth: list[int] = []
        for parent in self.parent:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        return tuple(depth)


def single(example: Example) -> Row:
    """One example alone: a chain, the simplest geometry."""
    n = len(example.ids)
    return Row(example.ids, tuple(range(-1, n - 1)), (n,) * n, example.learn, (example.origin,))


def untils(parents: Sequence[int]) -> tuple[int, ...]:
    """One past the end of the subtree that hangs on each token of a depth-first row."""
    until = list(range(1, len(parents) + 1))
    for i in reversed(range(len(parents))):  # children stand after their parent: each is complete before it is read
        if parents[i] >= 0:
            until[parents[i]] = max(until[parents[i]], until[i])
    return tuple(until)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a row without a branch: tokens start..end, hanging on the last token of segment `parent` (or -1)."""

    start: int
    end: int
    parent: int

    def __len__(self) -> int:
        return self.end - self.start


def segments(row: Row, *, longest: int | None = None) -> list[Segment]:
    """The row cut where it branches, in order; stretches over `longest` tokens into chains of about equal parts."""
    children = [0] * len(row)
    for parent in row.parent:
        if parent >= 0:
            children[parent] += 1
    cut: list[Segment] = []
    owner = [0] * len(row)  # the segment each token lies in
    start = 0
    for i in range(1, len(row) + 1):
        if i < len(row) and row.parent[i] == i - 1 and children[i - 1] == 1:
            continue
        above = row.parent[start]
        parent = owner[above] if above >= 0 else -1
        pieces = -(-(i - start) // (longest or len(row)))
        for piece in range(pieces):
            end = start + -(-(i - start) // (pieces - piece))
            owner[start:end] = [len(cut)] * (end - start)
            cut.append(Segment(start, end, parent))
            start, parent = end, len(cut) - 1
    return cut


def padded_tokens(examples: Sequence[Example]) -> int:
    """What a padded batch of these examples computes: the longest, as often as there are examples."""
    return len(examples) * max(len(example.ids) for example in examples)
