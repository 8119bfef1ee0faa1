"""Carried states: the states with which a branch's mixers start, in a stand-in for transformers' cache.

The protocol of that cache is private to the library, so layout_support.py tries the stand-in on each model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from atomtune.batch.segment_plan import SegmentBatch


class States:
    """Convolution and recurrent states of a batch of sequences, with the methods of transformers' cache for one mixer.

    Nothing is changed in place, so gradients flow through the states. The reported past has no tokens: otherwise a
    mixer could take its decoding path, which computes a single token.

    conv, recurrent          the states with which the sequences start, by transformers' number of the state
    new_conv, new_recurrent  those in which they end
    """

    def __init__(
        self, conv: dict[int, torch.Tensor] | None = None, recurrent: dict[int, torch.Tensor] | None = None
    ) -> None:
        self.conv, self.recurrent = conv or {}, recurrent or {}
        self.new_conv: dict[int, torch.Tensor] = {}
        self.new_recurrent: dict[int, torch.Tensor] = {}

    def get_conv_state(self, _layer_idx: int = 0, state_idx: int = 0) -> torch.Tensor | None:
        return self.conv.get(state_idx)

    def get_recurrent_state(self, _layer_idx: int = 0, state_idx: int = 0) -> torch.Tensor | None:
        return self.recurrent.get(state_idx)

    def update_conv_state(
        self, x: torch.Tensor, _layer_idx: int = 0, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> torch.Tensor:
        """Keep the last inputs of the convolution and return all inputs that it reads, as the library's cache does."""
        before = self.conv.get(state_idx)
        full = x if before is None else torch.cat([before, x], -1)
        kernel = conv_kernel_size or x.shape[-1]
        last = full[..., -kernel:]
        self.new_conv[state_idx] = functional.pad(last, (kernel - last.shape[-1], 0))
        return functional.pad(full, (max(0, kernel - full.shape[-1]), 0)) if before is None else full

    def update_recurrent_state(
        self, state: torch.Tensor, _layer_idx: int = 0, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        self.new_recurrent[state_idx] = state
        return state

    def update(self, *_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError("code of its own, which keeps keys and values")

    def is_recording_past(self, *_args: Any, **_kwargs: Any) -> bool:
        return True

    def has_previous_state(self, *_args: Any, **_kwargs: Any) -> bool:
        return bool(self.conv)

    def get_seq_length(self, *_args: Any, **_kwargs: Any) -> int:
        return 0

    @property
    def layers(self) -> "_Layers":
        """transformers 5.17 reads the states through this attribute."""
        return _Layers(self)


@dataclass(frozen=True)
class _Layers:
    """The states as transformers 5.17 reads them: `cache.layers[layer].conv_states[number]`, for any layer."""

    states: States
    record_past = True

    def __getitem__(self, _layer: int) -> "_Layers":
        return self

    @property
    def conv_states(self) -> dict[int, torch.Tensor]:
        return self.states.conv

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor]:
        return self.states.recurrent


def states_before(batch: SegmentBatch, states: Sequence[States]) -> States:
    """The states with which a batch's sequences start: the last states of their parents; empty at the root."""
    if not batch.parents:
        return States()
    parents = [states[number] for number, _ in batch.parents]  # [G] the states of each parent's whole batch
    conv = {key: _picked([parent.new_conv[key] for parent in parents], batch) for key in parents[0].new_conv}
    recurrent = {
        key: _picked([parent.new_recurrent[key] for parent in parents], batch) for key in parents[0].new_recurrent
    }
    return States(conv, recurrent)


def _picked(of_parents: Sequence[torch.Tensor], batch: SegmentBatch) -> torch.Tensor:
    """The rows of the parents' states, stacked in the order of this batch's sequences."""
    if all(states is of_parents[0] for states in of_parents):
        rows = torch.tensor([row for _, row in batch.parents], device=of_parents[0].device)
        return of_parents[0].index_select(0, rows)
    return torch.stack([states[row] for states, (_, row) in zip(of_parents, batch.parents, strict=True)])
