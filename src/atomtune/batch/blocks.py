"""Blocks: a row's attention as few dense products, which is what a CPU is good at.

The segments that hang on one token see the same path above them. Those of like length lie under each other in a block,
padded to one width. Derivation: docs/geometry.md.
Letters: T tokens of the row, G segments of a block, n the longest of them, A tokens of their path, S slots, H heads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from atomtune.batch.paths import Where, last_of, path_to, where
from atomtune.batch.row import Segment

#: A block costs about as much time as this many scores (query-key pairs) of all heads; measured on two cores, 512 wide.
_BLOCK_PAIRS = 20_000
#: What a padded query costs besides its scores: the gathers and products of its head dimension.
_QUERY_PAIRS = 100
#: Widths are multiples of the first, keys of the second. A CPU's matrix library compiles a kernel for every new shape,
#: and its softmax in bfloat16 is six times slower where the keys are no multiple of 32 (docs/log.md).
WIDTH_STEP = 16
_KEYS_STEP = 32


@dataclass(frozen=True, slots=True)
class Block:
    """G segments under each other, padded on the right to n tokens each, and the keys they meet.

    count       G
    width       n
    first       its first slot; the block holds the slots first .. first + G * n
    path_keys   keys of the path that are multiplied: A, and more that are masked up to a multiple of 32 in all
    mask        [n, n] or, where a window cuts the path, [n, A + n]: 0 where a query sees a key, -inf elsewhere

    Segments b (three tokens) and c (two) hang on a path of two tokens p; G = 2, n = 3, A = 2, one key of filling (f):

        slot      0   1   2   3   4   5        scores   p0 p1 f  own own own
        token    b0  b1  b2  c0  c1  c1        b0, c0    1  1  .   1   .   .
        position  2   3   4   2   3   3        b1, c1    1  1  .   1   1   .
        holds     1   1   1   1   1   .        b2, --    1  1  .   1   1   1

    "own" are the three slots of the same segment. Padding repeats a token, so that its softmax is a number; its output
    is read by nobody.
    """

    count: int
    width: int
    first: int
    path_keys: int
    mask: torch.Tensor

    @property
    def scores(self) -> int:
        """How many scores a head has here."""
        return self.count * self.width * (self.path_keys + self.width)


@dataclass(frozen=True, slots=True)
class Siblings:
    """The blocks whose segments hang on the same token, and the path down to that token.

    path_tokens   A, how many tokens of the path the segments see
    path          these tokens, and after them the filling of the widest block; None where the segments begin a tree

    Two branches of unlike length get a block each; both read the same path:

                        ┌ b b b b b b b b b      block 0 of these siblings: G = 1, n = 9
        p p p p p p ────┤
                        ├ c c                    block 1: G = 2, n = 2
                        └ d d

        position of a segment's first token = A (without a window)
    """

    path_tokens: int
    path: Where | None
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Blocks:
    """All blocks of a row, and where its tokens lie in them.

    slots    [S]  the token in each slot; padding repeats a token
    slot_of  [T]  the slot of each token of the row
    holds    [S]  whether a slot holds a token and not padding
    """

    each: tuple[Siblings, ...]
    slots: torch.Tensor
    slot_of: torch.Tensor
    holds: torch.Tensor

    def by_head(self, heads: int) -> "Places":
        """Where each head's slots lie when block stands behind block, each [H, G * n, D]."""
        head = torch.arange(heads, device=self.slots.device)[:, None]  # [H, 1]
        gather: list[torch.Tensor] = []
        place: list[torch.Tensor] = []
        holds: list[torch.Tensor] = []
        for siblings in self.each:
            for block in siblings.blocks:
                size = block.count * block.width
                span = slice(block.first, block.first + size)
                slot = torch.arange(size, device=head.device)[:, None]  # [G * n, 1]
                gather.append((self.slots[span] * heads + head).flatten())  # [H * G * n], head by head
                place.append(heads * block.first + head.T * size + slot)  # [G * n, H], slot by slot
                holds.append(self.holds[span].repeat(heads))
        back = torch.cat(place)[self.slot_of].flatten()  # [S, H] → [T * H]
        return Places(torch.cat(gather), back, torch.cat(holds)[:, None])


@dataclass(frozen=True, slots=True)
class Places:
    """Blocks.by_head: every (slot, head) and (token, head) as one row of D numbers.

    gather  [H * S]  the row of [T * H, D] that each holds
    back    [T * H]  the row of [H * S, D] that holds each, for the tokens of the row
    holds   [H * S, 1]  False for padding
    """

    gather: torch.Tensor
    back: torch.Tensor
    holds: torch.Tensor


def cut_into_blocks(parts: Sequence[Segment], window: int | None, tokens: int) -> Blocks:
    """The blocks of a row of `tokens` with padding, cut into these segments."""
    hanging: dict[int, list[Segment]] = {}  # segments by the segment they hang on
    for part in parts:
        hanging.setdefault(part.parent, []).append(part)
    slots = _SlotLists()
    siblings: list[Siblings] = []
    for parent, group in hanging.items():
        path = path_to(parts, parent)
        path_tokens = sum(end - start for start, end in path)
        if window is not None:
            path_tokens = min(path_tokens, window - 1)  # no query of these segments sees further up
        blocks = tuple(slots.add_block(same_width, path_tokens, window) for same_width in _bucketed(group, path_tokens))
        filling = max(block.path_keys for block in blocks) - path_tokens
        siblings.append(Siblings(path_tokens, where(last_of(path, path_tokens), filling, tokens), blocks))
    return slots.blocks(siblings)


class _SlotLists:
    """The slots of a row as they are dealt out, block by block."""

    def __init__(self) -> None:
        self.tokens: list[int] = []  # of each slot
        self.filled: list[int] = []  # the slots that hold a token and not padding

    def add_block(self, group: Sequence[Segment], path_tokens: int, window: int | None) -> Block:
        """Lay these siblings under each other."""
        width, first = max(map(_padded_width, group)), len(self.tokens)
        for number, part in enumerate(group):
            begin = first + number * width
            self.filled += range(begin, begin + len(part))
            self.tokens += range(part.start, part.end)
            self.tokens += [part.end - 1] * (width - len(part))
        filling = -(path_tokens + width) % _KEYS_STEP if path_tokens else 0
        hides = window is not None and window < path_tokens + width
        mask = _mask(width, path_tokens if hides else 0, window)
        return Block(len(group), width, first, path_tokens + filling, mask)

    def blocks(self, siblings: Sequence[Siblings]) -> Blocks:
        slots, filled = torch.tensor(self.tokens), torch.tensor(self.filled)
        slot_of = torch.empty_like(filled).index_copy_(0, slots[filled], filled)
        holds = torch.zeros(len(slots), dtype=torch.bool).index_fill_(0, filled, value=True)
        return Blocks(tuple(siblings), slots, slot_of, holds)


def _bucketed(group: Iterable[Segment], path_tokens: int) -> Iterable[list[Segment]]:
    """Divide siblings by length so that padding and the number of blocks together cost least.

    Exact: of every beginning of the list sorted by length, the best division is known before it is needed.
    """
    by_length = sorted(group, key=len)
    least_cost, last_cut = [0.0], [0]  # of the first `end` segments
    for end in range(1, len(by_length) + 1):
        width = _padded_width(by_length[end - 1])
        segment_cost = width * (path_tokens + width + _QUERY_PAIRS)
        costs = [least_cost[start] + _BLOCK_PAIRS + (end - start) * segment_cost for start in range(end)]
        least_cost.append(min(costs))
        last_cut.append(costs.index(least_cost[-1]))
    end = len(by_length)
    while end:
        yield sorted(by_length[last_cut[end] : end], key=lambda part: part.start)
        end = last_cut[end]


def _padded_width(part: Segment) -> int:
    return -(-len(part) // WIDTH_STEP) * WIDTH_STEP


@lru_cache(maxsize=64)  # bounded: below a sliding window every length of a path has a mask of its own
def _mask(width: int, path_tokens: int, window: int | None) -> torch.Tensor:
    """[n, A + n] additive: causal among the n, and everything further up than the window hidden.

    width 3, path_tokens 4, window 3:    p0 p1 p2 p3  b0 b1 b2
                                   b0     .  .  1  1   1  .  .
                                   b1     .  .  .  1   1  1  .
                                   b2     .  .  .  .   1  1  1
    """
    q, k = torch.arange(width)[:, None], torch.arange(-path_tokens, width)[None]
    seen = k <= q
    if window is not None:
        seen = seen & (q - k < window)
    return torch.zeros(width, path_tokens + width).masked_fill(~seen, -torch.inf)
