"""Trees: examples with a common prefix share it in one row, where it is computed once.

Sharing does not change the result, so only the cost decides which prefixes are shared. Prior work with shared prefixes
in training: TRL's AsyncGRPO, Unsloth's GRPO grouping, Tree Training (arXiv 2511.00413).
No torch here.
"""

from collections.abc import Sequence

from atomtune.batch.row import Row, untils
from atomtune.data.records import Example
from atomtune.shared_prefix import shared_length

#: A prefix that saves fewer tokens than this is not shared: on four kinds of records such prefixes are a thousandth of
#: the tokens (docs/log.md), and layers that carry a state compute every further branch as a segment of its own.
LEAST_SAVED = 16


def graft(examples: Sequence[Example], *, least_saved: int = LEAST_SAVED) -> Row:
    """All examples in one row, in which common prefixes occur once.

    A prefix of n tokens that m examples share is merged if that saves at least `least_saved` tokens: (m - 1) * n. Below
    1, every common prefix is merged. A target that several examples share has the sum of their `learn`.
    """
    row = _GrowingRow()
    # Sorting puts examples with equal prefixes next to each other: what the first and the last of a group share, all
    # examples between them share too.
    in_order = sorted(examples, key=lambda example: example.ids)
    waiting = [(in_order, 0, -1)]
    while waiting:  # a stack, not recursion: a batch may have a thousand records, each a prefix of the next
        group, start, parent = waiting.pop()
        end = shared_length(group[0].ids, group[-1].ids, start=start)
        ending, branches = _parted(group, end)
        saved = (len(group) - 1) * (end - start)
        if len(group) == 1 or saved >= least_saved:
            parent = row.add(group, start, end, parent)
            start = end
        else:
            # Not worth merging: examples that end here, equal ones or prefixes of others, get branches of their own.
            branches += [[example] for example in ending]
        # Popped from the end, so short leaves come first: neighbouring chunks of attention then have similar sizes.
        branches.sort(key=_weight, reverse=True)
        waiting += [(branch, start, parent) for branch in branches]
    origins = tuple(example.origin for example in examples)
    return Row(tuple(row.ids), tuple(row.parents), untils(row.parents), tuple(row.learn), origins)


class _GrowingRow:
    """The columns of a Row while it is built."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.learn: list[int] = []

    def add(self, group: Sequence[Example], start: int, end: int, parent: int) -> int:
        """Append the tokens start..end, which the group shares, below `parent`; returns the index of the last one."""
        if end == start:
            return parent
        first = len(self.ids)
        self.ids += group[0].ids[start:end]
        marks = zip(*(example.learn[start:end] for example in group), strict=True)  # for each token, of all examples
        self.learn += map(sum, marks)
        last = len(self.ids) - 1
        self.parents += (parent, *range(first, last))
        return last


def _weight(group: Sequence[Example]) -> tuple[bool, int]:
    return len(group) > 1, max(len(example.ids) for example in group)


def _parted(group: Sequence[Example], at: int) -> tuple[list[Example], list[list[Example]]]:
    """Split a sorted group into (examples with exactly `at` tokens, the others grouped by their token `at`)."""
    ending = [example for example in group if len(example.ids) == at]
    branches: list[list[Example]] = []
    for example in group[len(ending) :]:
        if branches and branches[-1][0].ids[at] == example.ids[at]:
            branches[-1].append(example)
        else:
            branches.append([example])
    return ending, branches
