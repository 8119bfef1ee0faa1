"""Attention plans: which queries of a row meet which keys, as a few dense blocks instead of a T x T mask.

Before: tree.py or pack.py makes the Row.  After: model.attention computes the blocks.
A row is cut where it branches. Segments that hang on the same token see the same path above them, so they are laid
under each other: one block of queries against [path | themselves]. Derivation: docs/geometry.md.
Letters: T tokens of the row, G segments of a block, n the longest of them, A tokens of their path.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Self

import torch

from atomtune.batch.row import Row, Segment, segments

#: Longer stretches are cut into chains of this many tokens, which bounds the memory of one block's scores.
LONGEST_SEGMENT = 256
#: A block costs about as much time as this many scores (query-key pairs) of one head; measured on two cores, 512 wide.
_BLOCK_PAIRS = 40_000
#: What a padded query costs besides its scores: the gathers and products of its head dimension.
_QUERY_PAIRS = 100

#: Widths are rounded up to a multiple of this. A CPU's matrix library compiles a kernel for every new shape, which took
#: a third of the time of a run whose every batch had a shape of its own (docs/log.md).
_WIDTH_STEP = 16

#: A stretch of tokens, or their indices where they do not stand together.
Where = slice | torch.Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """G segments under each other, padded on the right to n tokens.

    slots   [G * n]  the token in each slot; padding repeats a token and is never read back
    filled  [N]      the slots that hold a token, or None where all do
    holds   [G * n, 1]  1.0 for those and 0.0 for padding, or None
    tokens  the N tokens in the order of the filled slots
    path    the A tokens above the segments, or None
    mask    [n, n] or, where a window cuts the path, [n, A + n]: 0 where a query sees a key, -inf elsewhere
    """

    count: int
    width: int
    slots: torch.Tensor
    filled: torch.Tensor | None
    holds: torch.Tensor | None
    tokens: Where
    path: Where | None
    mask: torch.Tensor

    def to(self, device: torch.device) -> Self:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name in ("slots", "filled", "holds", "tokens", "path", "mask")
            if isinstance(value := getattr(self, name), torch.Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class AttentionPlan:
    """The blocks of one row, for layers that see everything before (None) and for each sliding window.

    until, position  [T]  the law itself, from which a dense mask can be made
    real  how many of the T tokens are the row's; the rest is padding, which no block holds
    """

    blocks: dict[int | None, tuple[Block, ...]]
    until: torch.Tensor
    position: torch.Tensor
    real: int
    _dense: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "AttentionPlan":
        if self.until.device == device:
            return self
        blocks = {window: tuple(block.to(device) for block in each) for window, each in self.blocks.items()}
        return AttentionPlan(blocks, self.until.to(device), self.position.to(device), self.real)

    def visible(self, window: int | None) -> torch.Tensor:
        """[1, 1, T, T] whether query (row) sees key (column); made once for all layers."""
        if window not in self._dense:
            self._dense[window] = visible(self.until, self.position, window=window)[None, None]
        return self._dense[window]


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
    parts = segments(row, longest=LONGEST_SEGMENT)
    whole = tuple(_blocks(parts, None))
    blocks = {
        window: whole if window is None or window >= deepest else tuple(_blocks(parts, window)) for window in windows
    }
    padding = (width or len(row)) - len(row)
    until = (*row.until, *[len(row) + padding] * padding)  # padding sees padding: a query must see something
    return AttentionPlan(blocks, torch.tensor(until), torch.tensor((*position, *[0] * padding)), len(row))


def _blocks(parts: Sequence[Segment], window: int | None) -> Iterable[Block]:
    siblings: dict[int, list[int]] = {}
    for number, part in enumerate(parts):
        siblings.setdefault(part.parent, []).append(number)
    for parent, numbers in siblings.items():
        path = _path(parts, parent)
        above = sum(end - start for start, end in path)
        kept = above if window is None else min(above, window - 1)  # no query of these segments sees further up
        for group in _bucketed([parts[number] for number in numbers], kept):
            yield _block(group, _last(path, kept), kept, window)


def _path(parts: Sequence[Segment], number: int) -> list[tuple[int, int]]:
    """The stretches from the start of the row's tree down to segment `number`; touching ones joined."""
    path: list[tuple[int, int]] = []
    while number >= 0:
        start, end = parts[number].start, parts[number].end
        path = [(start, path[0][1]), *path[1:]] if path and path[0][0] == end else [(start, end), *path]
        number = parts[number].parent
    return path


def _last(path: Sequence[tuple[int, int]], count: int) -> Where | None:
    """The last `count` tokens of a path."""
    kept: list[tuple[int, int]] = []
    for start, end in reversed(path):
        if count > 0:
            kept.insert(0, (max(start, end - count), end))
            count -= end - start
    if not kept:
        return None
    return slice(*kept[0]) if len(kept) == 1 else torch.cat([torch.arange(*stretch) for stretch in kept])


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
        yield group[cut[end] : end]
        end = cut[end]


def _width(part: Segment) -> int:
    return -(-len(part) // _WIDTH_STEP) * _WIDTH_STEP


def _block(group: Sequence[Segment], path: Where | None, above: int, window: int | None) -> Block:
    group = sorted(group, key=lambda part: part.start)
    width = max(map(_width, group))
    slots = [min(part.start + i, part.end - 1) for part in group for i in range(width)]
    filled = [g * width + i for g, part in enumerate(group) for i in range(len(part))]
    tokens = [slots[slot] for slot in filled]
    padded = len(filled) < len(slots)
    together = tokens[-1] - tokens[0] == len(tokens) - 1
    return Block(
        count=len(group),
        width=width,
        slots=torch.tensor(slots),
        filled=torch.tensor(filled) if padded else None,
        holds=torch.zeros(len(slots), 1).index_fill_(0, torch.tensor(filled), 1.0) if padded else None,
        tokens=slice(tokens[0], tokens[-1] + 1) if together else torch.tensor(tokens),
        path=path,
        mask=_mask(width, 0 if window is None or window >= above + width else above, window),
    )


@cache
def _mask(width: int, above: int, window: int | None) -> torch.Tensor:
    """[n, A + n] additive: causal among the n, and everything further up than the window hidden."""
    q, k = torch.arange(width)[:, None], torch.arange(-above, width)[None]
    seen = (k <= q) if window is None else (k <= q) & (q - k < window)
    return torch.zeros(width, above + width).masked_fill(~seen, -torch.inf)
