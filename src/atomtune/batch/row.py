"""Rows: the position of every token of a batch, and which other tokens it sees.

Law: token q sees token k exactly when k <= q < until[k]. Token i is predicted from the hidden state of parent[i] and
counted learn[i] times. There is no label shift anywhere.

A shared prefix p with the branches b and c:

    i            0  1  2  3  4       sees   p0 p1 b0 b1 c0
    token       p0 p1 b0 b1 c0       p0      1  .  .  .  .
    parent      -1  0  1  2  1       p1      1  1  .  .  .
    until        5  5  4  4  5       b0      1  1  1  .  .
    position     0  1  2  3  2       b1      1  1  1  1  .
                                     c0      1  1  .  .  1

No torch here.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from atomtune.data.records import Example


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens of one or more trees, in depth-first order.

    parent[i]  index of the token before i on its path; -1 at a root
    until[i]   end of the subtree below i, exclusive
    learn[i]   how many times i counts as a target
    origins    the records in this row
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
        """Whether the row is a single path, for which an ordinary causal mask is right."""
        return all(parent == i - 1 for i, parent in enumerate(self.parent))

    def positions(self) -> tuple[int, ...]:
        """The position of each token: the number of tokens above it on its path."""
        depth: list[int] = []
        for parent in self.parent:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        return tuple(depth)


def single(example: Example) -> Row:
    """A row of one example: a chain, in which each token's parent is the token before it."""
    n = len(example.ids)
    return Row(example.ids, tuple(range(-1, n - 1)), (n,) * n, example.learn, (example.origin,))


def untils(parents: Sequence[int]) -> tuple[int, ...]:
    """`until` of a row in depth-first order, from its `parent`."""
    until = list(range(1, len(parents) + 1))
    for i in reversed(range(len(parents))):  # children come after their parent, so until[i] is final here
        if parents[i] >= 0:
            until[parents[i]] = max(until[parents[i]], until[i])
    return tuple(until)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start..end (exclusive) of a row, with no branch inside.

    The first token's parent is the last token of segment `parent`; -1 for a root.
    """

    start: int
    end: int
    parent: int

    def __len__(self) -> int:
        return self.end - self.start


def segments(row: Row) -> list[Segment]:
    """Cut a row at its branches, in order.

    tokens     p0 p1 b0 b1 c0
    segments   (0, 2, -1)  (2, 4, 0)  (4, 5, 0)
    """
    children = Counter(row.parent)  # their number, of each token
    cut: list[Segment] = []
    owner = [0] * len(row)  # the segment of each token
    start = 0
    for i in range(1, len(row) + 1):
        if i < len(row) and children[i - 1] == 1:  # in depth-first order, an only child comes next
            continue
        above = row.parent[start]
        parent = owner[above] if above >= 0 else -1
        owner[start:i] = [len(cut)] * (i - start)
        cut.append(Segment(start, i, parent))
        start = i
    return cut


def padded_tokens(examples: Sequence[Example]) -> int:
    """Tokens that a padded batch of these examples computes: the longest example's, times the number of examples."""
    return len(examples) * max(len(example.ids) for example in examples)
