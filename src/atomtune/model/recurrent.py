"""Layers that carry a state from token to token, in rows that hold many records and branch.

Linear attention, Mamba and short convolutions mix tokens without asking who sees whom, so a row would leak from record
to record and from branch to branch. They are found by a probe and not by a list of architectures: a token mixer is a
module whose later outputs depend on an earlier input and that does not use the library's attention. Two ways to
compute a row (batch/segment_plan.py), of which the trial in layout_support.py takes the first that is exact:

fork   every segment runs through the model's own mixer and starts from its parent's state, which a stand-in for
       transformers' cache hands over; Mamba 1 takes it in selective_scan.py. The cache's protocol is private to the
       library: hence the trial.
paths  every path from root to leaf runs as a sequence of its own; linear layers inside compute each token once.

Letters: G sequences of a batch, n their tokens, T tokens of the row, D width, P paths, L the longest of them.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from atomtune.batch.attention_plan import AttentionPlan
from atomtune.batch.segment_plan import SegmentBatch, SegmentPlan
from atomtune.model.attention_in_use import AttentionInUse
from atomtune.model.modes import as_in_training, without_dropout
from atomtune.model.row_attention import attend, own_window
from atomtune.model.selective_scan import scans_from

Way = Literal["fork", "paths"]
#: Names under which mixers take transformers' cache.
_CACHE_NAMES = {"cache", "cache_params", "past_key_values"}
#: Names under which they take hidden states.
_INPUT_NAMES = ("hidden_states", "x", "input")
_PROBE_TOKENS = 12
_PROBE_ATTENTION = "atomtune_probe"


# The row that a model computes now.


class RowInUse:
    """The plan of the row in the model; its mixers ask for it.

    A plan is announced before the model is called and taken when its body begins. So it also holds for layers that are
    computed again in the backward pass, and a call without an announcement (chat, a plain comparison) finds none.
    """

    def __init__(self) -> None:
        self.announced: AttentionPlan | None = None
        self.plan: AttentionPlan | None = None
        self.hook: Any = None

    def begin(self, *_call: Any) -> None:
        self.plan, self.announced = self.announced, None


def announce(body: nn.Module, plan: AttentionPlan | None) -> None:
    """Tell a model's mixers, if it has any that were given a way, what the next call computes."""
    row = vars(body).get("atomtune_row")
    if row is not None:
        row.announced = plan


def takes_cache(mixer: nn.Module) -> bool:
    """Whether a mixer can be handed a state."""
    return bool(_CACHE_NAMES & inspect.signature(type(mixer).forward).parameters.keys())


def carries_state(body: nn.Module) -> bool:
    """Whether this model's mixers were given a way to compute rows."""
    return "atomtune_row" in vars(body)


# Finding mixers.


@dataclass
class _Call:
    """How a module was called in the probe."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    windows: set[int | None] = field(default_factory=set)  # of the library's attention inside; None sees all before

    @property
    def attends(self) -> bool:
        return bool(self.windows)


def find_mixers(inner: nn.Module) -> tuple[list[nn.Module], set[int | None]]:
    """The outermost modules in the decoder's layers that mix tokens without the library's attention; and the sliding
    windows of those that use it (None: sees everything before), empty where none does.
    """
    with without_dropout(inner):
        return _find_mixers(inner)


def _find_mixers(inner: nn.Module) -> tuple[list[nn.Module], set[int | None]]:
    calls = _calls_in_a_probe(inner)
    mixers: list[nn.Module] = []
    known: dict[tuple[Any, ...], bool] = {}  # layers that are built alike are probed once

    def mixes(module: nn.Module) -> bool:
        built = (calls[module].attends, *((name, type(part)) for name, part in module.named_modules()))
        if built not in known:
            known[built] = _mixes(module, calls[module])
        return known[built]

    def look_into(module: nn.Module) -> None:
        call = calls.get(module)
        if call is not None:
            if not mixes(module):
                return
            if not call.attends and not any(mixes(child) for child in module.children() if child in calls):
                mixers.append(module)
                return
        for child in module.children():
            look_into(child)

    for layers in (m for m in inner.modules() if isinstance(m, nn.ModuleList)):
        for layer in layers:
            if "hidden_states" in inspect.signature(layer.forward).parameters:
                look_into(layer)
    return list(dict.fromkeys(mixers)), calls[inner].windows


def _calls_in_a_probe(inner: Any) -> dict[nn.Module, _Call]:
    """How every module is called for a short text; attention is watched through its public interface."""
    calls: dict[nn.Module, _Call] = {}
    inside: list[_Call] = []

    def watch_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for call in inside:
            call.windows.add(kwargs.get("sliding_window") or own_window(module))
        return attend(module, *args, **kwargs)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inside.append(calls.setdefault(module, _Call(args, kwargs)))

    def after(*_call: Any) -> None:
        inside.pop()

    AttentionInterface.register(_PROBE_ATTENTION, watch_attention)
    AttentionMaskInterface.register(_PROBE_ATTENTION, sdpa_mask)
    ids = torch.arange(3, 3 + _PROBE_TOKENS, device=inner.get_input_embeddings().weight.device)[None]
    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in inner.modules()]
    hooks += [m.register_forward_hook(after, with_kwargs=True) for m in inner.modules()]
    try:
        with _attention(inner, _PROBE_ATTENTION), as_in_training(inner):
            inner(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@contextlib.contextmanager
def _attention(inner: Any, name: str) -> Iterator[None]:
    """Within this, the model uses another attention function, where it lets itself be told."""
    before = AttentionInUse.of(inner)
    with contextlib.suppress(ValueError, AttributeError, ImportError, KeyError):
        inner.set_attn_implementation(name)
    try:
        yield
    finally:
        before.give_back()


def _mixes(module: nn.Module, call: _Call) -> bool:
    """Whether outputs at later tokens depend on an earlier token's input.

    Asked of the gradient, which is zero to the bit where they do not: in bfloat16 the outputs of a linear attention
    with new weights change by less than other modules' do through rounding.
    """
    at, hidden = _input_of(call)
    if hidden is None:
        return False
    hidden = hidden.detach().requires_grad_()
    args = tuple(hidden if at == i else value for i, value in enumerate(call.args))
    kwargs = {name: hidden if at == name else value for name, value in call.kwargs.items()}
    out = _first(module(*args, **kwargs))
    if not (isinstance(out, torch.Tensor) and out.dim() == 3 and out.shape[1] == hidden.shape[1] and out.requires_grad):
        return False
    # Random weights for the outputs: their plain sum is constant behind a norm.
    direction = torch.randn(out[:, 4:].shape, generator=torch.Generator().manual_seed(0)).to(out)
    (gradient,) = torch.autograd.grad(out[:, 4:], hidden, direction, allow_unused=True)
    return gradient is not None and bool(gradient[:, 3].any())


def _input_of(call: _Call) -> tuple[int | str | None, torch.Tensor | None]:
    """Which argument holds the hidden states [1, T, D], and these."""
    places: list[tuple[int | str, Any]] = [*enumerate(call.args)]
    places += [(name, call.kwargs.get(name)) for name in _INPUT_NAMES]
    for at, value in places:
        if isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[:2] == (1, _PROBE_TOKENS):
            return at, value
    return None, None


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


# Giving mixers a way.


def give_way(body: nn.Module, mixers: Sequence[nn.Module], way: Way) -> None:
    """Let these mixers compute rows; `body` is the module whose call begins a row."""
    take_way(body, mixers)
    row = RowInUse()
    vars(body)["atomtune_row"] = row  # a plain value: it is copied along with the model
    row.hook = body.register_forward_pre_hook(row.begin)
    for mixer in mixers:
        mixer.forward = _RowForward(mixer, row, way)


def take_way(body: nn.Module, mixers: Sequence[nn.Module]) -> None:
    """Give mixers their own forward again."""
    for mixer in mixers:
        standing = vars(mixer).get("forward")
        if isinstance(standing, _RowForward):
            del mixer.forward
            if standing.own is not None:
                mixer.forward = standing.own
    row = vars(body).pop("atomtune_row", None)
    if row is not None:
        row.hook.remove()


@dataclass
class _RowForward:
    """Stands in a mixer's `forward`, as accelerate's hooks do.

    A row needs several calls of the mixer, and a public hook can only change what goes in and what comes out of one.
    """

    mixer: nn.Module
    row: RowInUse
    way: Way
    own: Callable[..., Any] | None = field(init=False)  # of the instance, where something has hooked it before

    def __post_init__(self) -> None:
        self.own = vars(self.mixer).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.row.plan.segments if self.row.plan is not None else None
        if plan is None:
            return self.plain(*args, **kwargs)
        name = next((name for name in _INPUT_NAMES if name in kwargs), None)
        hidden, others = (kwargs.pop(name), args) if name else (args[0], args[1:])  # [1, T, D]
        compute = _by_forks if self.way == "fork" else _by_paths
        return compute(self, hidden, others, kwargs, plan)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.mixer).forward(self.mixer, *args, **kwargs)

    @property
    def cache_name(self) -> str | None:
        parameters = inspect.signature(type(self.mixer).forward).parameters
        return next((name for name in _CACHE_NAMES if name in parameters), None)


def _filled_up(out: torch.Tensor, width: int) -> torch.Tensor:
    """[T, D] of the row's tokens → [1, width, D]; its padding is zero."""
    return functional.pad(out, (0, 0, 0, width - len(out)))[None]


def _like(output: Any, out: torch.Tensor) -> Any:
    """As the mixer returns it: alone, or first in a tuple (attention weights and the like are not kept)."""
    return (out, *[None] * (len(output) - 1)) if isinstance(output, tuple) else out


# By forks.


def _by_forks(
    mixer: _RowForward, hidden: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], plan: SegmentPlan
) -> Any:
    name = mixer.cache_name
    if name is None:
        raise NotImplementedError("a token mixer that takes no cache")
    kwargs = {key: value for key, value in kwargs.items() if key not in (name, "attention_mask")}
    states: list[_States] = []
    results: list[torch.Tensor] = []
    output: Any = None
    for batch in plan.batches:
        carrier = _start(batch, states)
        with scans_from(mixer.mixer, carrier.recurrent.get(0)):
            sequences = hidden[0][batch.tokens.to(hidden.device)]
            output = mixer.plain(sequences, *args, **{**kwargs, name: carrier})  # [G, n, D]
        states.append(carrier)
        results.append(_first(output).flatten(0, 1)[batch.places.to(hidden.device)])
    out = torch.cat(results)[plan.order.to(hidden.device)]  # [T, D]
    return _like(output, _filled_up(out, hidden.shape[1]))


def _start(batch: SegmentBatch, states: Sequence["_States"]) -> "_States":
    """The states that a batch's sequences start from: their parents' last ones."""
    if not batch.parents:
        return _States()
    first = states[batch.parents[0][0]]
    return _States(
        conv={key: _picked([states[b].new_conv[key] for b, _ in batch.parents], batch) for key in first.new_conv},
        recurrent={
            key: _picked([states[b].new_recurrent[key] for b, _ in batch.parents], batch) for key in first.new_recurrent
        },
    )


def _picked(of_parents: Sequence[torch.Tensor], batch: SegmentBatch) -> torch.Tensor:
    """The row of each parent in its own batch's states, under each other."""
    if all(states is of_parents[0] for states in of_parents):
        rows = torch.tensor([row for _, row in batch.parents], device=of_parents[0].device)
        return of_parents[0].index_select(0, rows)
    return torch.stack([states[row] for states, (_, row) in zip(of_parents, batch.parents, strict=True)])


class _States:
    """Convolution and recurrent states of a batch of sequences, in the shape of transformers' cache for one mixer.

    Nothing is copied in place, so gradients flow through the states. It never says that it holds a single token's past,
    which would send the mixer down its decoding way.
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
        """Keep the last inputs of the convolution and return all it reads, as the library's cache does."""
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

    def __bool__(self) -> bool:
        return True

    @property
    def layers(self) -> "_Layers":
        """transformers 5.17 reads the states from here."""
        return _Layers(self)


@dataclass(frozen=True)
class _Layers:
    states: _States
    record_past = True

    def __getitem__(self, _layer: int) -> "_Layers":
        return self

    @property
    def conv_states(self) -> dict[int, torch.Tensor]:
        return self.states.conv

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor]:
        return self.states.recurrent


# By paths.


def _by_paths(
    mixer: _RowForward, hidden: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], plan: SegmentPlan
) -> Any:
    kwargs = {key: None if key in (mixer.cache_name, "attention_mask") else value for key, value in kwargs.items()}
    paths, first_on = plan.paths.to(hidden.device), plan.first_on.to(hidden.device)
    with _linear_layers_once(mixer.mixer, paths, first_on):
        output = mixer.plain(hidden[0][paths], *[None for _ in args], **kwargs)  # [P, L, D]
    out = _first(output).flatten(0, 1)[first_on]  # [T, D]
    return _like(output, _filled_up(out, hidden.shape[1]))


@contextlib.contextmanager
def _linear_layers_once(mixer: nn.Module, paths: torch.Tensor, first_on: torch.Tensor) -> Iterator[None]:
    """Within this, linear layers that are handed all paths compute each token of the row once."""
    hooked: list[tuple[nn.Module, Any]] = []
    latest: list[torch.Tensor] = []  # what a layer was handed, and the same by token

    def by_token(x: torch.Tensor) -> torch.Tensor:
        """[P, L, D] → [1, T, D]; one tensor for all layers that read the same, which fused_lora.py computes as one."""
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
    """The outermost linear layers: a LoRA layer counts as one."""
    for child in module.children():
        if isinstance(child, nn.Linear) or hasattr(child, "lora_A"):
            yield child
        else:
            yield from _linear_layers(child)
