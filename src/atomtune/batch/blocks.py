"""Blocks: a row's attention as a few dense matrix products, which are fast on a CPU.

Segments with the same parent see the same path above them. Those of similar length are stacked in a block, padded to
one width. Derivation: docs/geometry.md.
Letters: T tokens in the row, G segments in a block, n its width, A tokens of their path, S slots, H heads, D their
dimension.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from atomtune.batch.paths import Where, last_of, path_to, where
from atomtune.batch.row import Segment

#: Fixed cost of a block, in scores (query-key pairs) of all heads; measured on two cores, with a model 512 wide.
_BLOCK_PAIRS = 20_000
#: Cost of a query besides its scores, in scores: gathers and products over its head dimension.
_QUERY_PAIRS = 100
#: Block widths are multiples of the first, numbers of keys of the second. A CPU's matrix library compiles a kernel for
#: every new shape, and its bfloat16 softmax is six times slower if the keys are not a multiple of 32 (docs/log.md).
WIDTH_STEP = 16
_KEYS_STEP = 32


@dataclass(frozen=True, slots=True)
class Block:
    """G segments, padded on the right to n tokens each, and their keys.

    count       G
    width       n
    first       its first slot; the block has the slots first .. first + G * n (exclusive)
    path_keys   number of keys from the path: A, and masked filling so that all keys are a multiple of 32
    mask        [n, n] or, if a window hides part of the path, [n, A + n]: 0 where a query sees a key, else -inf

    Segments b (three tokens) and c (two) below a path of two tokens p; G = 2, n = 3, A = 2, one key of filling (f):

        slot      0   1   2   3   4   5        scores   p0 p1 f  own own own
        token    b0  b1  b2  c0  c1  c1        b0, c0    1  1  .   1   .   .
        position  2   3   4   2   3   3        b1, c1    1  1  .   1   1   .
        holds     1   1   1   1   1   .        b2, --    1  1  .   1   1   1

    "own" are the three slots of the same segment. Padding repeats a token, so that its softmax is not NaN; its output
    is not used.
    """

    count: int
    width: int
    first: int
    path_keys: int
    mask: torch.Tensor

    @property
    def scores(self) -> int:
        """The number of scores that one head computes for this block."""
        return self.count * self.width * (self.path_keys + self.width)


@dataclass(frozen=True, slots=True)
class Siblings:
    """The blocks of segments with the same parent, and the path down to that parent.

    path_tokens   A, the number of path tokens that the segments see
    path          these tokens, then the filling of the block with the most; None for the roots of trees

    Branches of different length get separate blocks, which use the same path:

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
    """All blocks of a row, and the slots of its tokens in them.

    slots    [S]  the token in each slot; padding repeats a token
    slot_of  [T]  the slot of each token, without the row's padding
    holds    [S]  bool, False for padding
    """

    each: tuple[Siblings, ...]
    slots: torch.Tensor
    slot_of: torch.Tensor
    holds: torch.Tensor

    def by_head(self, heads: int) -> "Places":
        """The places of each head's slots when all blocks, each [H, G * n, D], are concatenated."""
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
        back = torch.cat(place)[self.slot_of].flatten()  # [S, H] → [T, H] → [T * H]
        return Places(torch.cat(gather), back, torch.cat(holds)[:, None])


@dataclass(frozen=True, slots=True)
class Places:
    """Indices between tokens and blocks, for each head; a (token, head) or (slot, head) is one row of D numbers.

    gather  [H * S]  for each (slot, head), its row in the tokens' [T * H, D]
    back    [T * H]  for each (token, head), its row in the blocks' [H * S, D]
    holds   [H * S, 1]  bool, False for padding
    """

    gather: torch.Tensor
    back: torch.Tensor
    holds: torch.Tensor


def cut_into_blocks(parts: Sequence[Segment], window: int | None, tokens: int) -> Blocks:
    """The blocks of a row whose segments are `parts`.

    window  the sliding window of the layer, or None
    tokens  T, padding included
    """
    hanging: dict[int, list[Segment]] = {}  # parent segment → its children
    for part in parts:
        hanging.setdefault(part.parent, []).append(part)
    slots = _SlotLists()
    siblings: list[Siblings] = []
    for parent, group in hanging.items():
        path = path_to(parts, parent)
        path_tokens = sum(end - start for start, end in path)
        if window is not None:
            path_tokens = min(path_tokens, window - 1)  # no query of these segments sees more of the path
        blocks = tuple(slots.add_block(same_width, path_tokens, window) for same_width in _bucketed(group, path_tokens))
        filling = max(block.path_keys for block in blocks) - path_tokens
        siblings.append(Siblings(path_tokens, where(last_of(path, path_tokens), filling, tokens), blocks))
    return slots.blocks(siblings)


class _SlotLists:
    """Assigns the slots of a row, block by block."""

    def __init__(self) -> None:
        self.tokens: list[int] = []  # the token in each slot
        self.filled: list[int] = []  # the slots that are not padding

    def add_block(self, group: Sequence[Segment], path_tokens: int, window: int | None) -> Block:
        """Add a block of these siblings."""
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
    """Divide siblings by length into blocks, with the least total cost of padding and blocks.

    Exact, by dynamic programming over the prefixes of the list sorted by length.
    """
    by_length = sorted(group, key=len)
    least_cost, last_cut = [0.0], [0]  # at index `end`: for the first `end` segments
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


@lru_cache(maxsize=64)  # bounded: with a sliding window, every path length has a mask of its own
def _mask(width: int, path_tokens: int, window: int | None) -> torch.Tensor:
    """[n, A + n] additive mask: causal within the segment, and only the last `window` tokens are seen.

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
