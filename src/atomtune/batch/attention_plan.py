"""Attention plans: which queries of a row meet which keys, without a T x T mask.

A row is cut where it branches into segments; the segments that hang on one token see the same path above them.
Two ways to lay out the same law (`Cut`): a CPU multiplies few dense blocks, a GPU's kernel takes spans of many lengths.
Derivation: docs/geometry.md. Letter: T tokens of the row.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import torch

from atomtune.batch.blocks import WIDTH_STEP, Blocks, Places, cut_into_blocks
from atomtune.batch.row import Row, segments
from atomtune.batch.segment_plan import SegmentPlan, plan_segments
from atomtune.batch.spans import Spans, cut_into_spans

#: Longer stretches are cut into chains of about equal length: half of a stretch's block against itself is masked, and
#: scores that leave the cache cost more (docs/log.md).
LONGEST_SEGMENT = 256
#: How a row is cut: into dense blocks (a CPU), or into spans for a kernel that takes sequences of many lengths (a GPU).
Cut = Literal["blocks", "spans"]


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
            blocks[window] = cut_into_blocks(parts, window, tokens) if hides or None not in blocks else blocks[None]
        else:
            spans[window] = cut_into_spans(parts, window if hides else None, tokens)
    positions = torch.tensor((*position, *[0] * padding))
    forks = plan_segments(row) if carries_state else None
    return AttentionPlan(blocks, spans, torch.tensor(until), positions, len(row), forks)


def padded_length(tokens: int) -> int:
    """Rows are padded to few different lengths, at most a sixteenth longer: multiples of 1/16 to 1/32 of their size."""
    step = max(WIDTH_STEP, 1 << max(0, tokens.bit_length() - 5))
    return -(-tokens // step) * step
