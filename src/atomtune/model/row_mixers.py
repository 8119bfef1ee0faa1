"""Row mixers: layers that carry a state from token to token, in rows that hold many records and branch.

A row is computed by one of two methods (batch/segment_plan.py); layout_support.py takes the first that is exact:

fork   every segment runs through the model's own mixer, starting from its parent's last state (carried_state.py;
       selective_scan.py for Mamba 1)
paths  every path from the root to a leaf runs as a separate sequence, but linear layers compute each token only once

Letters: G sequences of a batch, n their tokens, T tokens of the row, D width, P paths, L tokens of the longest path;
K own tokens of a batch's segments.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from atomtune.batch.attention_plan import AttentionPlan
from atomtune.batch.segment_plan import MixerMethod, PathPlan, SegmentPlan
from atomtune.model.carried_state import States, states_before
from atomtune.model.mixers import INPUT_NAMES, cache_name, first_of
from atomtune.model.selective_scan import scans_from


class RowInUse:
    """The plan of the row that the model computes now, for its mixers.

    The plan is announced before the model is called, and taken when its body begins. So it also holds for layers that
    are recomputed in the backward pass, and a call without an announcement (chat, a plain comparison) has no plan.
    """

    def __init__(self, method: MixerMethod) -> None:
        self.method = method
        self.announced: AttentionPlan | None = None
        self.plan: AttentionPlan | None = None
        self.hook: Any = None

    def begin(self, *_call: Any) -> None:
        self.plan, self.announced = self.announced, None


def announce(body: nn.Module, plan: AttentionPlan) -> None:
    """Tell a model's mixers which row the next call computes, if `install` was called for the model."""
    row = vars(body).get("atomtune_row")
    if row is not None:
        row.announced = plan


def method_in_use(body: nn.Module) -> MixerMethod | None:
    """The method for which `install` was called; None if it was not called for this model."""
    row = vars(body).get("atomtune_row")
    return None if row is None else row.method


def install(body: nn.Module, mixers: Sequence[nn.Module], method: MixerMethod) -> None:
    """Let these mixers compute rows; each row begins with a call of `body`."""
    uninstall(body, mixers)
    row = RowInUse(method)
    vars(body)["atomtune_row"] = row  # not a submodule or buffer; it is copied with the model
    row.hook = body.register_forward_pre_hook(row.begin)
    for mixer in mixers:
        mixer.forward = _RowForward(mixer, row)


def uninstall(body: nn.Module, mixers: Sequence[nn.Module]) -> None:
    """Restore the mixers' own forward."""
    for mixer in mixers:
        standing = vars(mixer).get("forward")
        if isinstance(standing, _RowForward):
            del mixer.forward
            if standing.own is not None:
                mixer.forward = standing.own
    row = vars(body).pop("atomtune_row", None)
    if row is not None:
        row.hook.remove()


class _RowForward:
    """Replaces a mixer's `forward`, as accelerate's hooks do.

    A row needs several calls of the mixer, but a public hook can only change the inputs and outputs of one.
    own  the forward of the instance, if something else had hooked it
    """

    def __init__(self, mixer: nn.Module, row: RowInUse) -> None:
        self.mixer, self.row = mixer, row
        self.own: Callable[..., Any] | None = vars(mixer).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.row.plan.mixers if self.row.plan is not None else None
        if plan is None:
            return self.plain(*args, **kwargs)
        name = next((name for name in INPUT_NAMES if name in kwargs), None)
        hidden, others = (kwargs.pop(name), args) if name else (args[0], args[1:])  # [1, T, D]
        if isinstance(plan, SegmentPlan):
            return _by_forks(self, hidden, others, kwargs, plan)
        return _by_paths(self, hidden, others, kwargs, plan)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.mixer).forward(self.mixer, *args, **kwargs)


def _in_form_of(output: Any, out: torch.Tensor, width: int) -> Any:
    """[T, D] of the row's tokens → [1, width, D], padded with zeros; in a tuple with None, if the mixer returns one."""
    padded = functional.pad(out, (0, 0, 0, width - len(out)))[None]
    return (padded, *[None] * (len(output) - 1)) if isinstance(output, tuple) else padded


def _by_forks(
    mixer: _RowForward, hidden: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], plan: SegmentPlan
) -> Any:
    """The mixer's output for a row [1, T, D], segment by segment: a batch starts from the states of earlier batches."""
    cache = cache_name(mixer.mixer)
    assert cache is not None  # a mixer that cannot be given a state computes rows by paths
    kwargs = {key: value for key, value in kwargs.items() if key not in (cache, "attention_mask")}
    states: list[States] = []  # of each batch so far: those it started with, and those in which its sequences ended
    results: list[torch.Tensor] = []
    output: Any = None
    for batch in plan.batches:
        batch_states = states_before(batch, states)
        sequences = hidden[0][batch.tokens.to(hidden.device)]  # [G, n, D]
        with scans_from(mixer.mixer, batch_states.recurrent.get(0)):
            output = mixer.plain(sequences, *args, **{**kwargs, cache: batch_states})  # [G, n, D]
        states.append(batch_states)
        by_place = first_of(output).flatten(0, 1)  # [G * n, D], padding and tokens that are run again included
        results.append(by_place[batch.places.to(hidden.device)])  # [K, D]
    out = torch.cat(results)[plan.order.to(hidden.device)]  # [T, D] in the order of the row
    return _in_form_of(output, out, hidden.shape[1])


def _by_paths(
    mixer: _RowForward, hidden: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], plan: PathPlan
) -> Any:
    """The mixer's output for a row [1, T, D], with every path from the root to a leaf as a sequence of its own.

    The cache and the mask of the row are left out, because neither belongs to a path.
    """
    left_out = (cache_name(mixer.mixer), "attention_mask")
    kwargs = {key: None if key in left_out else value for key, value in kwargs.items()}
    paths, first_on = plan.paths.to(hidden.device), plan.first_on.to(hidden.device)
    with _linear_layers_once(mixer.mixer, paths, first_on):
        output = mixer.plain(hidden[0][paths], *[None for _ in args], **kwargs)  # [P, L, D]
    out = first_of(output).flatten(0, 1)[first_on]  # [T, D]
    return _in_form_of(output, out, hidden.shape[1])


@contextlib.contextmanager
def _linear_layers_once(mixer: nn.Module, paths: torch.Tensor, first_on: torch.Tensor) -> Iterator[None]:
    """Within this context, linear layers that are given all paths compute each token of the row once."""
    hooked: list[tuple[nn.Module, Any]] = []
    latest: list[torch.Tensor] = []  # the last input of a layer, and that input by token

    def by_token(x: torch.Tensor) -> torch.Tensor:
        """[P, L, D] → [1, T, D]; one tensor for all layers with the same input, so that fused_lora.py fuses them."""
        if not latest or latest[0] is not x:
            latest[:] = [x, x.flatten(0, 1)[first_on][None]]
        return latest[1]

    for layer in dict.fromkeys(_linear_layers(mixer)):
        own, forward = vars(layer).get("forward"), layer.forward

        def once(x: torch.Tensor, *args: Any, _forward: Callable[..., Any] = forward, **kwargs: Any) -> Any:
            if x.shape[:2] != paths.shape:
                return _forward(x, *args, **kwargs)
            return _forward(by_token(x), *args, **kwargs)[0][paths]

        layer.forward = once
        hooked.append((layer, own))
    try:
        yield
    finally:
        for layer, own in hooked:
            del layer.forward
            if own is not None:
                layer.forward = own


def _linear_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost linear layers; a LoRA layer counts as one."""
    for child in module.children():
        if isinstance(child, nn.Linear) or hasattr(child, "lora_A"):
            yield child
        else:
            yield from _linear_layers(child)
