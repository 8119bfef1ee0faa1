"""Trees: examples that begin alike share one trunk in a row.

Sharing is exact, so where to share is a question of cost alone. Prior work with shared prefixes in training: TRL's
AsyncGRPO, Unsloth's GRPO grouping, Tree Training (arXiv 2511.00413).
No torch here.
"""

from collections.abc import Sequence

from atomtune.batch.row import Row, untils
from atomtune.data.records import Example

#: A trunk that saves fewer tokens than this costs more in extra attention blocks than it saves: on two CPU cores and a
#: model of 512 wide a block costs about as much as 13 tokens (docs/log.md). Wider models only make sharing cheaper.
LEAST_SAVED = 16


def graft(examples: Sequence[Example], *, least_saved: int = LEAST_SAVED) -> Row:
    """All examples in one row; each beginning that several of them share stands there once.

    A beginning is shared where that saves at least `least_saved` tokens: (examples - 1) * tokens. Below one, nothing is
    too little. A target that several examples share counts as often.
    """
    ids: list[int] = []
    parents: list[int] = []
    learn: list[int] = []
    # Sorting puts equal beginnings next to each other: what the first and the last share, all between them share.
    waiting = [(sorted(examples, key=lambda example: example.ids), 0, -1)]
    while waiting:  # a stack and not recursion: a batch may hold a thousand records, each the beginning of the next
        group, start, parent = waiting.pop()
        end = _shared_until(group, start)
        if worth := len(group) == 1 or (len(group) - 1) * (end - start) >= least_saved:
            first = len(ids)
            ids += group[0].ids[start:end]
            learn += map(sum, zip(*(example.learn[start:end] for example in group), strict=True))
            if end > start:
                parents += (parent, *range(first, len(ids) - 1))
                parent = len(ids) - 1
            start = end
        whole, parts = _parted(group, end)
        if not worth:
            # Equal examples, or one that begins others, too short for a trunk to pay: each stands alone.
            parts += [[example] for example in whole]
        # Popped from the end, so short leaves come first: neighbours of one length share an attention block.
        waiting += [(part, start, parent) for part in sorted(parts, key=_weight, reverse=True)]
    return Row(tuple(ids), tuple(parents), untils(parents), tuple(learn), tuple(e.origin for e in examples))


def _weight(group: Sequence[Example]) -> tuple[bool, int]:
    return len(group) > 1, max(len(example.ids) for example in group)


def _shared_until(group: Sequence[Example], start: int) -> int:
    """One past the last token that all examples of a sorted group share, which are known to agree before start."""
    first, last = group[0].ids, group[-1].ids
    most = min(len(first), len(last))
    while start < most and first[start] == last[start]:
        start += 1
    return start


def _parted(group: Sequence[Example], at: int) -> tuple[list[Example], list[list[Example]]]:
    """(examples that end here, the others by their next token)."""
    whole = [example for example in group if len(example.ids) == at]
    parts: list[list[Example]] = []
    for example in group[len(whole) :]:
        if parts and parts[-1][0].ids[at] == example.ids[at]:
            parts[-1].append(example)
        else:
            parts.append([example])
    return whole, parts
