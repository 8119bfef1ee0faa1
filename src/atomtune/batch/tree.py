"""Trees: examples that begin alike share one trunk in a row.

Sharing is exact, so where to share is a question of cost alone. Prior work with shared prefixes in training: TRL's
AsyncGRPO, Unsloth's GRPO grouping, Tree Training (arXiv 2511.00413).
No torch here.
"""

from collections.abc import Sequence

from atomtune.batch.row import Row, untils
from atomtune.data.records import Example
from atomtune.shared_prefix import shared_length

#: A trunk that saves fewer tokens than this costs more in extra attention blocks than it saves: on two CPU cores and a
#: model of 512 wide a block costs about as much as 13 tokens (docs/log.md). Wider models only make sharing cheaper.
LEAST_SAVED = 16


def graft(examples: Sequence[Example], *, least_saved: int = LEAST_SAVED) -> Row:
    """All examples in one row; each beginning that several of them share stands there once.

    A beginning is shared where that saves at least `least_saved` tokens: (examples - 1) * tokens. Below one, nothing is
    too little. A target that several examples share counts as often.
    """
    row = _GrowingRow()
    # Sorting puts equal beginnings next to each other: what the first and the last share, all between them share.
    in_order = sorted(examples, key=lambda example: example.ids)
    waiting = [(in_order, 0, -1)]
    while waiting:  # a stack and not recursion: a batch may hold a thousand records, each the beginning of the next
        group, start, parent = waiting.pop()
        end = shared_length(group[0].ids, group[-1].ids, start=start)
        ending, branches = _parted(group, end)
        saved = (len(group) - 1) * (end - start)
        if len(group) == 1 or saved >= least_saved:
            parent = row.add(group, start, end, parent)
            start = end
        else:
            # Equal examples, or one that begins others, too short for a trunk to pay: each stands alone.
            branches += [[example] for example in ending]
        # Popped from the end, so short leaves come first: neighbours of one length share an attention block.
        branches.sort(key=_weight, reverse=True)
        waiting += [(branch, start, parent) for branch in branches]
    origins = tuple(example.origin for example in examples)
    return Row(tuple(row.ids), tuple(row.parents), untils(row.parents), tuple(row.learn), origins)


class _GrowingRow:
    """The lists that a Row is made of, token by token."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.learn: list[int] = []

    def add(self, group: Sequence[Example], start: int, end: int, parent: int) -> int:
        """Lay the tokens start..end that a group shares under a parent; the last token laid, for what hangs on them."""
        if end == start:
            return parent
        first = len(self.ids)
        self.ids += group[0].ids[start:end]
        marks = zip(*(example.learn[start:end] for example in group), strict=True)  # of all examples, by token
        self.learn += map(sum, marks)
        last = len(self.ids) - 1
        self.parents += (parent, *range(first, last))
        return last


def _weight(group: Sequence[Example]) -> tuple[bool, int]:
    return len(group) > 1, max(len(example.ids) for example in group)


def _parted(group: Sequence[Example], at: int) -> tuple[list[Example], list[list[Example]]]:
    """Of a sorted group: (examples that end here, the others by their next token)."""
    ending = [example for example in group if len(example.ids) == at]
    branches: list[list[Example]] = []
    for example in group[len(ending) :]:
        if branches and branches[-1][0].ids[at] == example.ids[at]:
            branches[-1].append(example)
        else:
            branches.append([example])
    return ending, branches
