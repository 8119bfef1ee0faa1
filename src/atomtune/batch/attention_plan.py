"""Attention plans: which queries of a row meet which keys, as a few dense blocks instead of a T x T mask.

Before: tree.py or pack.py makes the Row.  After: model.row_attention computes the blocks.
A row is cut where it branches. Segments that hang on the same token see the same path above them, so they are laid
under each other: one block of queries against [path | themselves]. Derivation: docs/geometry.md.
Letters: T tokens of the row, G segments of a block, n the longest of them, A tokens of their path.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from atomtune.batch.row import Row, Segment, segments

#: Longer stretches are cut into chains of about equal length, which bounds the memory of one block's scores.
LONGEST_SEGMENT = 384
#: A block costs about as much time as this many scores (query-key pairs) of all heads; measured on two cores, 512 wide.
_BLOCK_PAIRS = 20_000
#: What a padded query costs besides its scores: the gathers and products of its head dimension.
_QUERY_PAIRS = 100
#: Widths are multiples of the first, keys of the second. A CPU's matrix library compiles a kernel for every new shape,
#: and its softmax in bfloat16 is six times slower where the keys are no multiple of 32 (docs/log.md).
_WIDTH_STEP = 16
_KEYS_STEP = 32

#: A stretch of tokens, or their indices where they do not stand together.
Where = slice | torch.Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """G segments under each other, padded on the right to n tokens each.

    first   its first slot; the block holds the slots first .. first + G * n
    path    how many tokens of its family's path are multiplied, so that all keys together are a multiple of 32
    mask    [n, n] or, where a window cuts the path, [n, A + n]: 0 where a query sees a key, -inf elsewhere
    """

    count: int
    width: int
    first: int
    path: int
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Siblings:
    """The blocks whose segments hang on the same token.

    above   A, how many tokens of their path the segments may see
    path    those tokens, and behind them others that nobody here sees; None where there are none above
    """

    above: int
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
        head = torch.arange(heads, device=self.slots.device)
        gather, place, holds = [], [], []
        for block in (block for siblings in self.each for block in siblings.blocks):
            size = block.count * block.width
            span = slice(block.first, block.first + size)
            gather.append((self.slots[span] * heads + head[:, None]).flatten())
            place.append(heads * block.first + head * size + torch.arange(size, device=head.device)[:, None])
            holds.append(self.holds[span].repeat(heads))
        return Places(torch.cat(gather), torch.cat(place)[self.slot_of].flatten(), torch.cat(holds)[:, None])


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


@dataclass(frozen=True)
class AttentionPlan:
    """The blocks of one row, for layers that see everything before (None) and for each sliding window.

    until, position  [T]  the law itself, from which a dense mask can be made
    real  how many of the T tokens are the row's; the rest is padding, which no block holds
    """

    blocks: dict[int | None, Blocks]
    until: torch.Tensor
    position: torch.Tensor
    real: int
    _dense: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _places: dict[tuple[int | None, int], Places] = field(default_factory=dict)

    def to(self, device: torch.device) -> "AttentionPlan":
        if self.until.device == device:
            return self
        blocks = {window: _moved(each, device) for window, each in self.blocks.items()}
        return AttentionPlan(blocks, self.until.to(device), self.position.to(device), self.real)

    def places(self, window: int | None, heads: int) -> Places:
        """Where each head's slots lie; made once for all layers."""
        if (window, heads) not in self._places:
            self._places[window, heads] = self.blocks[window].by_head(heads)
        return self._places[window, heads]

    def visible(self, window: int | None) -> torch.Tensor:
        """[1, 1, T, T] whether query (row) sees key (column); made once for all layers."""
        if window not in self._dense:
            self._dense[window] = visible(self.until, self.position, window=window)[None, None]
        return self._dense[window]


def _moved(value: Any, device: torch.device) -> Any:
    """The same, its tensors on the device, in tuples and parts as well."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_moved(one, device) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _moved(getattr(value, one.name), device) for one in fields(value)})
    return value


def visible(until: torch.Tensor, position: torch.Tensor, *, window: int | None = None) -> torch.Tensor:
    """[T, T] bool, the law: q sees k exactly when k <= q < until[k], and k is one of the last `window` on its path."""
    q, k = torch.arange(len(until), device=until.device)[:, None], torch.arange(len(until), device=until.device)[None]
    seen = (k <= q) & (q < until[None])  # [T, T]
    return seen if window is None else seen & (position[:, None] - position[None] < window)


def padded_length(tokens: int) -> int:
    """Rows are padded to few different lengths, at most a sixteenth longer: multiples of 1/16 to 1/32 of their size."""
    step = max(_WIDTH_STEP, 1 << max(0, tokens.bit_length() - 5))
    return -(-tokens // step) * step


def plan_attention(row: Row, *, windows: Iterable[int | None] = (None,), width: int | None = None) -> AttentionPlan:
    """The blocks of a row, for each kind of layer the model has; `width` is the row's length with padding."""
    position = row.positions()
    deepest = max(position, default=0) + 1
    tokens = width or len(row)
    parts = segments(row, longest=LONGEST_SEGMENT)
    whole = _blocks(parts, None, tokens)
    blocks = {
        window: whole if window is None or window >= deepest else _blocks(parts, window, tokens) for window in windows
    }
    padding = tokens - len(row)
    until = (*row.until, *[tokens] * padding)  # padding sees padding: a query must see something
    return AttentionPlan(blocks, torch.tensor(until), torch.tensor((*position, *[0] * padding)), len(row))


def _blocks(parts: Sequence[Segment], window: int | None, tokens: int) -> Blocks:
    hanging: dict[int, list[Segment]] = {}
    for part in parts:
        hanging.setdefault(part.parent, []).append(part)
    each: list[Siblings] = []
    slots: list[int] = []
    filled: list[int] = []
    for parent, siblings in hanging.items():
        path = _path(parts, parent)
        length = sum(end - start for start, end in path)
        above = length if window is None else min(length, window - 1)  # no query of these segments sees further up
        blocks = []
        for group in _bucketed(siblings, above):
            n, first = max(map(_width, group)), len(slots)
            mask = _mask(n, 0 if window is None or window >= above + n else above, window)
            blocks.append(Block(len(group), n, first, above + -(above + n) % _KEYS_STEP if above else 0, mask))
            slots += [min(part.start + i, part.end - 1) for part in group for i in range(n)]
            filled += [first + g * n + i for g, part in enumerate(group) for i in range(len(part))]
        filling = max(block.path for block in blocks) - above
        each.append(Siblings(above, _last(path, above, filling, tokens), tuple(blocks)))
    tokens_in, where = torch.tensor(slots), torch.tensor(filled)
    slot_of = torch.empty_like(where).index_copy_(0, tokens_in[where], where)
    holds = torch.zeros(len(slots), dtype=torch.bool).index_fill_(0, where, value=True)
    return Blocks(tuple(each), tokens_in, slot_of, holds)


def _path(parts: Sequence[Segment], number: int) -> list[tuple[int, int]]:
    """The stretches from the start of the row's tree down to segment `number`; touching ones joined."""
    path: list[tuple[int, int]] = []
    while number >= 0:
        start, end = parts[number].start, parts[number].end
        path = [(start, path[0][1]), *path[1:]] if path and path[0][0] == end else [(start, end), *path]
        number = parts[number].parent
    return path


def _last(path: Sequence[tuple[int, int]], count: int, filling: int, tokens: int) -> Where | None:
    """The last `count` tokens of a path and `filling` more of a row of `tokens`, whichever are at hand."""
    kept: list[tuple[int, int]] = []
    for start, end in reversed(path):
        if count > 0:
            kept.insert(0, (max(start, end - count), end))
            count -= end - start
    if not kept:
        return None
    if len(kept) == 1 and kept[0][1] + filling <= tokens:
        return slice(kept[0][0], kept[0][1] + filling)
    return torch.cat([*(torch.arange(*stretch) for stretch in kept), torch.zeros(filling, dtype=torch.long)])


def _bucketed(group: list[Segment], above: int) -> Iterable[list[Segment]]:
    """Divide siblings by length so that padding and the number of blocks together cost least (exact, by the first
    best division of every beginning of the sorted list)."""
    group = sorted(group, key=len)
    best, cut = [0.0], [0]
    for end in range(1, len(group) + 1):
        width = _width(group[end - 1])
        costs = [
            best[start] + _BLOCK_PAIRS + (end - start) * width * (above + width + _QUERY_PAIRS) for start in range(end)
        ]
        best.append(min(costs))
        cut.append(costs.index(best[-1]))
    end = len(group)
    while end:
        yield sorted(group[cut[end] : end], key=lambda part: part.start)
        end = cut[end]


def _width(part: Segment) -> int:
    return -(-len(part) // _WIDTH_STEP) * _WIDTH_STEP


@lru_cache(maxsize=64)  # bounded: below a sliding window every length of a path has a mask of its own
def _mask(width: int, above: int, window: int | None) -> torch.Tensor:
    """[n, A + n] additive: causal among the n, and everything further up than the window hidden."""
    q, k = torch.arange(width)[:, None], torch.arange(-above, width)[None]
    seen = (k <= q) if window is None else (k <= q) & (q - k < window)
    return torch.zeros(width, above + width).masked_fill(~seen, -torch.inf)
