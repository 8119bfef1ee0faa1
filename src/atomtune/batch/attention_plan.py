"""Attention plans: which queries of a row are multiplied with which keys, without a T x T mask.

There are two ways to compute this (`Cut`): a few dense blocks on a CPU, variable-length spans on a GPU.
Derivation: docs/geometry.md. Letter: T tokens in the row.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import torch

from atomtune.batch.blocks import QUERY_STEP, Blocks, Places, cut_into_blocks
from atomtune.batch.row import Row, segments
from atomtune.batch.segment_plan import MixerMethod, PathPlan, SegmentPlan, plan_paths, plan_segments
from atomtune.batch.spans import Spans, cut_into_spans

#: How a row is cut: into dense blocks (CPU), or into spans for a kernel with variable-length sequences (GPU).
Cut = Literal["blocks", "spans"]


@dataclass(frozen=True)
class AttentionPlan:
    """One row's attention, for layers with full attention (None) and for each sliding window.

    blocks, spans     window → the cut; one of the two is empty, and padding is in no block
    until, position   [T]  as in Row, from which a dense mask can be made
    """

    blocks: dict[int | None, Blocks]
    spans: dict[int | None, Spans]
    until: torch.Tensor
    position: torch.Tensor
    mixers: SegmentPlan | PathPlan | None = None  # for layers that carry a state from token to token
    _dense: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _dense_bias: dict[tuple[int | None, torch.dtype], torch.Tensor] = field(default_factory=dict)
    _block_biases: dict[tuple[int | None, torch.dtype], tuple[torch.Tensor, ...]] = field(default_factory=dict)
    _places: dict[tuple[int | None, int, int], Places] = field(default_factory=dict)

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that the plan was made for."""
        return self.blocks.keys() | self.spans.keys()

    def to(self, device: torch.device, *, non_blocking: bool = True) -> "AttentionPlan":
        if self.until.device == device:
            return self
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "AttentionPlan":
        """The same plan in page-locked memory; called by the DataLoader."""
        return self._each_tensor(torch.Tensor.pin_memory)

    def _each_tensor(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "AttentionPlan":
        blocks = {window: _changed(blocks, change) for window, blocks in self.blocks.items()}
        spans = {window: _changed(spans, change) for window, spans in self.spans.items()}
        mixers = _changed(self.mixers, change)
        return AttentionPlan(blocks, spans, change(self.until), change(self.position), mixers)

    def rounded(self) -> "AttentionPlan":
        """The same attention with spans padded to one of few shapes."""
        spans = {window: spans.rounded(len(self.until)) for window, spans in self.spans.items()}
        return AttentionPlan({}, spans, self.until, self.position, self.mixers)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the plan, in the order that `with_tensors` expects."""
        tensors: list[torch.Tensor] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            tensors.append(tensor)
            return tensor

        self._each_tensor(note)
        return tensors

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> "AttentionPlan":
        """The same plan with other tensors; masks and places that are cached for all layers are computed again."""
        return self._each_tensor(lambda _: next(tensors))

    def places(self, window: int | None, heads: int, key_heads: int) -> Places:
        """The places of each head's slots (Blocks.places), computed once for all layers."""
        if (window, heads, key_heads) not in self._places:
            places = self.blocks[window].places(heads, key_heads)
            self._places[window, heads, key_heads] = places
        return self._places[window, heads, key_heads]

    def block_biases(self, window: int | None, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Of each block, [C, 1, n, m - seen_by_all] to add to the scores; computed once for all layers."""
        if (window, dtype) not in self._block_biases:
            blocks = self.blocks[window].each
            self._block_biases[window, dtype] = tuple(_bias_of(block.seen, dtype)[:, None] for block in blocks)
        return self._block_biases[window, dtype]

    def visible(self, window: int | None) -> torch.Tensor:
        """[1, 1, T, T] bool, whether query (row) sees key (column); computed once for all layers."""
        if window not in self._dense:
            self._dense[window] = visible(self.until, self.position, window=window)[None, None]
        return self._dense[window]

    def dense_bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[1, 1, T, T] to add to the scores: 0 where a query sees a key, else -inf; computed once for all layers."""
        if (window, dtype) not in self._dense_bias:
            seen = visible(self.until, self.position, window=window)
            self._dense_bias[window, dtype] = _bias_of(seen, dtype)[None, None]
        return self._dense_bias[window, dtype]


def _bias_of(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where `seen`, else -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The value with `change` applied to every tensor in it, also in tuples and in the fields of dataclasses."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_changed(part, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: _changed(getattr(value, part.name), change) for part in fields(value)})
    return value


def visible(until: torch.Tensor, position: torch.Tensor, *, window: int | None = None) -> torch.Tensor:
    """The law of row.py as a dense mask; with a window, q sees only the last `window` tokens of its path.

    until, position  [T]
    Returns [T, T] bool, one row per query.
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
    mixers: MixerMethod | None = None,
) -> AttentionPlan:
    """Plan the attention of a row, for each kind of layer in the model.

    windows  the sliding windows of the layers; None: full attention
    width    length of the row with padding; default: without
    mixers   how layers that carry a state from token to token compute the row; None if the model has none
    """
    position = row.positions()
    deepest = max(position, default=0) + 1
    tokens = width or len(row)
    padding = tokens - len(row)
    until = (*row.until, *[tokens] * padding)  # padding sees padding, as every query must see something
    blocks: dict[int | None, Blocks] = {}
    spans: dict[int | None, Spans] = {}
    parts = segments(row)
    for window in windows:
        # A window longer than the longest path hides nothing.
        hiding = window if window is not None and window < deepest else None
        if cut == "spans":
            spans[window] = cut_into_spans(parts, hiding, tokens)
        elif hiding is None and None in blocks:
            blocks[window] = blocks[None]
        else:
            blocks[window] = cut_into_blocks(row, position, parts, hiding, tokens)
    positions = torch.tensor((*position, *[0] * padding))
    states: SegmentPlan | PathPlan | None = None
    if mixers is not None:
        states = plan_segments(row) if mixers == "fork" else plan_paths(row)
    return AttentionPlan(blocks, spans, torch.tensor(until), positions, states)


def padded_length(tokens: int) -> int:
    """Round the length of a row up, so that there are few different lengths.

    The step is a power of two between 1/32 and 1/16 of the length, but at least QUERY_STEP.
    """
    step = max(QUERY_STEP, 1 << max(0, tokens.bit_length() - 5))
    return -(-tokens // step) * step
