"""Attention plans: which queries of a row meet which keys, without a T x T mask.

A row is cut where it branches into segments; the segments that hang on one token see the same path above them.
Two ways to lay out the same law (`Cut`): a CPU multiplies few dense blocks, a GPU's kernel takes spans of many lengths.
Derivation: docs/geometry.md.
Letters: T tokens of the row, G segments of a block, n the longest of them, A tokens of their path, S slots, H heads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch.nn import functional

from atomtune.batch.row import Row, Segment, segments
from atomtune.batch.segment_plan import SegmentPlan, plan_segments

#: Longer stretches are cut into chains of about equal length: half of a stretch's block against itself is masked, and
#: scores that leave the cache cost more (docs/log.md).
LONGEST_SEGMENT = 256
#: A block costs about as much time as this many scores (query-key pairs) of all heads; measured on two cores, 512 wide.
_BLOCK_PAIRS = 20_000
#: What a padded query costs besides its scores: the gathers and products of its head dimension.
_QUERY_PAIRS = 100
#: Widths are multiples of the first, keys of the second. A CPU's matrix library compiles a kernel for every new shape,
#: and its softmax in bfloat16 is six times slower where the keys are no multiple of 32 (docs/log.md).
_WIDTH_STEP = 16
_KEYS_STEP = 32

#: Gathered keys are filled up to a multiple of this where shapes are to be few: a sixteenth of what small trees gather.
_KEYS_FILLED = 512
#: How a row is cut: into dense blocks (a CPU), or into spans for a kernel that takes sequences of many lengths (a GPU).
Cut = Literal["blocks", "spans"]
#: Tokens of a row: a stretch of it, or their indices where they do not stand together.
Where = slice | torch.Tensor
#: Tokens start..end of a row.
Stretch = tuple[int, int]


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


@dataclass(frozen=True, slots=True)
class Spans:
    """A row as sequences of many lengths: span s asks with one segment and sees [its path | the segment].

    query_starts    [spans + 1]  int32, the first token of each span's segment; the last is T
    key_starts      [spans + 1]  int32, where each span's keys begin in `keys`
    keys            [K] the token of each key; None where every span sees itself alone (a packed row)
    longest_queries, longest_keys   of one span

    A shared prefix p and its branches b and c, T = 5:

        row            p0 p1 b0 b1 c0                 span 1   p0 p1 b0 b1
        query_starts    0     2     4  5                 b0     1  1  1  .
        keys           p0 p1 | p0 p1 b0 b1 | p0 p1 c0    b1     1  1  1  1
        key_starts      0       2             6     9

    The mask of a span is causal from its lower right corner: its last query sees all its keys. A window w keeps the
    last w of each query's keys, and the last w - 1 tokens of a path are enough for it.
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    keys: torch.Tensor | None
    longest_queries: int
    longest_keys: int

    def rounded(self, tokens: int) -> "Spans":
        """The same attention of the row's T tokens in one of few shapes.

        More spans stand behind the others and ask nothing; the last of them sees the keys that fill `keys` up.
        """
        more = _power_of_two(len(self.query_starts) + 1) - len(self.query_starts)
        keys = tokens if self.keys is None else len(self.keys)
        filled = tokens if self.keys is None else -(-keys // _KEYS_FILLED) * _KEYS_FILLED
        key_starts = functional.pad(functional.pad(self.key_starts, (0, more - 1), value=keys), (0, 1), value=filled)
        return Spans(
            functional.pad(self.query_starts, (0, more), value=tokens),
            key_starts,
            None if self.keys is None else functional.pad(self.keys, (0, filled - keys)),
            _power_of_two(self.longest_queries),
            _power_of_two(max(self.longest_keys, filled - keys)),
        )


@dataclass(frozen=True)
class AttentionPlan:
    """One row's attention, for layers that see everything before (None) and for each sliding window.

    blocks or spans   as it was cut; the other is empty
    until, position   [T]  the law itself, from which a dense mask can be made
    real              how many of the T tokens are the row's; the rest is padding, which no block holds
    """

    blocks: dict[int | None, Blocks]
    spans: dict[int | None, Spans]
    until: torch.Tensor
    position: torch.Tensor
    real: int
    segments: SegmentPlan | None = None  # for layers that carry a state from token to token
    _dense: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _bias: dict[tuple[int | None, torch.dtype], torch.Tensor] = field(default_factory=dict)
    _places: dict[tuple[int | None, int], Places] = field(default_factory=dict)

    @property
    def windows(self) -> set[int | None]:
        """The windows that it was made for."""
        return self.blocks.keys() | self.spans.keys()

    def to(self, device: torch.device, *, non_blocking: bool = True) -> "AttentionPlan":
        if self.until.device == device:
            return self
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "AttentionPlan":
        """The same in memory that a GPU reads by itself; a DataLoader asks for this."""
        return self._each_tensor(torch.Tensor.pin_memory)

    def _each_tensor(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "AttentionPlan":
        blocks = {window: _changed(blocks, change) for window, blocks in self.blocks.items()}
        spans = {window: _changed(spans, change) for window, spans in self.spans.items()}
        segments = _changed(self.segments, change)
        return AttentionPlan(blocks, spans, change(self.until), change(self.position), self.real, segments)

    def rounded(self) -> "AttentionPlan":
        """The same attention by spans, in one of few shapes."""
        spans = {window: spans.rounded(len(self.until)) for window, spans in self.spans.items()}
        return AttentionPlan({}, spans, self.until, self.position, self.real, self.segments)

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds, in the order in which `with_tensors` takes others."""
        tensors: list[torch.Tensor] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            tensors.append(tensor)
            return tensor

        self._each_tensor(note)
        return tensors

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> "AttentionPlan":
        """The same plan over other memory; what it keeps for all layers is made anew."""
        return self._each_tensor(lambda _: next(tensors))

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

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[1, 1, T, T] added to the scores: 0 where query sees key, -inf elsewhere; made once for all layers."""
        if (window, dtype) not in self._bias:
            seen = visible(self.until, self.position, window=window)[None, None]
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
            self._bias[window, dtype] = bias
        return self._bias[window, dtype]


def _changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same value, every tensor in it changed: in tuples and in the fields of dataclasses as well."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_changed(part, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: _changed(getattr(value, part.name), change) for part in fields(value)})
    return value


def visible(until: torch.Tensor, position: torch.Tensor, *, window: int | None = None) -> torch.Tensor:
    """The law as a mask: q sees k exactly when k <= q < until[k], and k is one of the last `window` on its path.

    until, position  [T]
    Returns [T, T] bool, a row for each query.
    """
    tokens = torch.arange(len(until), device=until.device)
    q, k = tokens[:, None], tokens[None]
    seen = (k <= q) & (q < until[None])  # [T, T]
    if window is None:
        return seen
    return seen & (position[:, None] - position[None] < window)


def padded_length(tokens: int) -> int:
    """Rows are padded to few different lengths, at most a sixteenth longer: multiples of 1/16 to 1/32 of their size."""
    step = max(_WIDTH_STEP, 1 << max(0, tokens.bit_length() - 5))
    return -(-tokens // step) * step


def _power_of_two(number: int) -> int:
    """The first that is not below a number."""
    return 1 << (number - 1).bit_length()


def plan_attention(
    row: Row,
    *,
    windows: Iterable[int | None] = (None,),
    width: int | None = None,
    cut: Cut = "blocks",
    carries_state: bool = False,
) -> AttentionPlan:
    """The plan of a row, for each kind of layer the model has.

    windows  the layers' sliding windows; None is a layer that sees everything before
    width    the row's length with padding
    carries_state   whether the model has layers that carry a state from token to token
    """
    position = row.positions()
    deepest = max(position, default=0) + 1
    tokens = width or len(row)
    padding = tokens - len(row)
    until = (*row.until, *[tokens] * padding)  # padding sees padding: a query must see something
    blocks: dict[int | None, Blocks] = {}
    spans: dict[int | None, Spans] = {}
    parts = segments(row, longest=LONGEST_SEGMENT if cut == "blocks" else None)
    for window in windows:
        # A window that reaches the start of every path hides nothing.
        hides = window is not None and window < deepest
        if cut == "blocks":
            blocks[window] = _blocks(parts, window, tokens) if hides or None not in blocks else blocks[None]
        else:
            spans[window] = _spans(parts, window if hides else None, tokens)
    positions = torch.tensor((*position, *[0] * padding))
    forks = plan_segments(row) if carries_state else None
    return AttentionPlan(blocks, spans, torch.tensor(until), positions, len(row), forks)


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


def _blocks(parts: Sequence[Segment], window: int | None, tokens: int) -> Blocks:
    """The blocks of a row of `tokens` with padding."""
    hanging: dict[int, list[Segment]] = {}  # segments by the segment they hang on
    for part in parts:
        hanging.setdefault(part.parent, []).append(part)
    slots = _SlotLists()
    families: list[Siblings] = []
    for parent, group in hanging.items():
        path = _path(parts, parent)
        path_tokens = sum(end - start for start, end in path)
        if window is not None:
            path_tokens = min(path_tokens, window - 1)  # no query of these segments sees further up
        blocks = tuple(slots.add_block(same_width, path_tokens, window) for same_width in _bucketed(group, path_tokens))
        filling = max(block.path_keys for block in blocks) - path_tokens
        families.append(Siblings(path_tokens, _where(_last(path, path_tokens), filling, tokens), blocks))
    return slots.blocks(families)


def _spans(parts: Sequence[Segment], window: int | None, tokens: int) -> Spans:
    """The spans of a row of `tokens` with padding; the padding is a span that sees itself."""
    query_starts, key_starts = [0], [0]
    keys: list[int] = []
    for part in parts:
        path = _path(parts, part.parent)
        if window is not None:
            path = _last(path, window - 1)
        for start, end in (*path, (part.start, part.end)):
            keys += range(start, end)
        query_starts.append(part.end)
        key_starts.append(len(keys))
    if tokens > query_starts[-1]:
        keys += range(query_starts[-1], tokens)
        query_starts.append(tokens)
        key_starts.append(len(keys))
    longest_queries, longest_keys = (
        max(end - start for start, end in pairwise(starts)) for starts in (query_starts, key_starts)
    )
    return Spans(
        torch.tensor(query_starts, dtype=torch.int32),
        torch.tensor(key_starts, dtype=torch.int32),
        None if len(keys) == tokens else torch.tensor(keys),
        longest_queries,
        longest_keys,
    )


def _path(parts: Sequence[Segment], number: int) -> list[Stretch]:
    """The stretches from the start of the row's tree down to segment `number`; touching ones joined."""
    path: list[Stretch] = []
    while number >= 0:
        start, end = parts[number].start, parts[number].end
        if path and path[-1][0] == end:
            end = path.pop()[1]
        path.append((start, end))  # from below to above
        number = parts[number].parent
    return path[::-1]


def _last(path: Sequence[Stretch], count: int) -> list[Stretch]:
    """The last `count` tokens of a path."""
    tail: list[Stretch] = []
    for start, end in reversed(path):
        if count > 0:
            tail.append((max(start, end - count), end))
            count -= end - start
    return tail[::-1]


def _where(stretches: Sequence[Stretch], filling: int, tokens: int) -> Where | None:
    """These stretches and `filling` more tokens, whichever are at hand, of a row of `tokens`."""
    if not stretches:
        return None
    start, end = stretches[-1]
    if len(stretches) == 1 and end + filling <= tokens:
        return slice(start, end + filling)
    return torch.cat([*(torch.arange(*stretch) for stretch in stretches), torch.zeros(filling, dtype=torch.long)])


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
    return -(-len(part) // _WIDTH_STEP) * _WIDTH_STEP


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
