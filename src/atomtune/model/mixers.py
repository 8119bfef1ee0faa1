"""Mixers: layers that carry a state from token to token, found by a probe.

Linear attention, Mamba and short convolutions mix all tokens of a sequence, without a mask. In a row they would leak
from record to record and from branch to branch; row_mixers.py prevents that. They are found by what they do, not by a
list of architectures: a mixer is a module whose later outputs depend on an earlier input, and that does not use the
library's attention.

Letters: T tokens, D width.
"""

import contextlib
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from atomtune.model.attention_in_use import AttentionInUse
from atomtune.model.modes import as_in_training, without_dropout
from atomtune.model.row_attention import attend, own_window

#: Names of forward's argument for transformers' cache.
_CACHE_NAMES = ("cache", "cache_params", "past_key_values")
#: Names of forward's argument for the hidden states.
INPUT_NAMES = ("hidden_states", "x", "input")
#: Tokens of the probe. `_mixes` asks whether the outputs of the tokens from _LATER on depend on the token before them.
_PROBE_TOKENS, _LATER = 12, 4
_PROBE_ATTENTION = "atomtune_probe"


def cache_name(mixer: nn.Module) -> str | None:
    """The name of the argument by which a mixer is given a state; None if it cannot be given one."""
    parameters = inspect.signature(type(mixer).forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), None)


@dataclass
class _Call:
    """The arguments with which a module was called in the probe."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    # Windows of the library's attention inside; None: sees all earlier tokens
    windows: set[int | None] = field(default_factory=set)

    @property
    def attends(self) -> bool:
        return bool(self.windows)


def find_mixers(inner: nn.Module) -> tuple[list[nn.Module], set[int | None]]:
    """The mixers in the decoder's layers, and the sliding windows of the layers that use the library's attention.

    A module that mixes only through a mixer inside it, such as a decoder layer, is not returned. A window of None sees
    all earlier tokens; the set is empty if no layer uses the library's attention.
    """
    with without_dropout(inner):
        calls = _calls_in_a_probe(inner)
        return _mixers_among(calls, inner), calls[inner].windows


def _mixers_among(calls: dict[nn.Module, _Call], inner: nn.Module) -> list[nn.Module]:
    """The modules in the decoder's layers that mix without attention, and not only through a module inside them."""
    mixers: list[nn.Module] = []
    known: dict[tuple[Any, ...], bool] = {}  # structure → what `mixes` returned for it

    def mixes(module: nn.Module) -> bool:
        """`_mixes`, once for all modules of the same structure."""
        built = (calls[module].attends, *((name, type(part)) for name, part in module.named_modules()))
        if built not in known:
            known[built] = _mixes(module, calls[module])
        return known[built]

    def look_into(module: nn.Module) -> None:
        """Add the mixers in this module, or the module itself if it mixes without attention and no child of it does."""
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
    return list(dict.fromkeys(mixers))


def _calls_in_a_probe(inner: Any) -> dict[nn.Module, _Call]:
    """How every module is called for a short text; attention calls are observed through the public interface."""
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
    with contextlib.ExitStack() as at_the_end:
        for module in inner.modules():
            at_the_end.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            at_the_end.enter_context(module.register_forward_hook(after))
        at_the_end.callback(AttentionInUse.of(inner).give_back)
        with contextlib.suppress(ValueError, AttributeError, ImportError, KeyError):  # not every model supports it
            inner.set_attn_implementation(_PROBE_ATTENTION)
        with as_in_training(inner):
            inner(input_ids=ids, use_cache=False)
    return calls


def _mixes(module: nn.Module, call: _Call) -> bool:
    """Whether outputs at later tokens depend on an earlier token's input.

    The test is a gradient, which is exactly zero if they do not. Comparing outputs is not enough: in bfloat16, those of
    an untrained linear attention change by less than those of other modules do through rounding.
    """
    at, hidden = _input_of(call)
    if hidden is None:
        return False
    hidden = hidden.detach().requires_grad_()
    args = tuple(hidden if at == i else value for i, value in enumerate(call.args))
    kwargs = {name: hidden if at == name else value for name, value in call.kwargs.items()}
    out = first_of(module(*args, **kwargs))
    if not (isinstance(out, torch.Tensor) and out.dim() == 3 and out.shape[1] == hidden.shape[1] and out.requires_grad):
        return False
    # A random direction, because the plain sum of the outputs is constant after a norm, so its gradient is zero.
    later = out[:, _LATER:]  # [1, T - 4, D]
    direction = torch.randn(later.shape, generator=torch.Generator().manual_seed(0)).to(out)
    (gradient,) = torch.autograd.grad(later, hidden, direction, allow_unused=True)  # [1, T, D]
    return gradient is not None and bool(gradient[:, _LATER - 1].any())


def _input_of(call: _Call) -> tuple[int | str | None, torch.Tensor | None]:
    """The argument (index or name) with the hidden states [1, T, D], and the tensor; (None, None) if there is none."""
    places: list[tuple[int | str, Any]] = [*enumerate(call.args)]
    places += [(name, call.kwargs.get(name)) for name in INPUT_NAMES]
    for at, value in places:
        if isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[:2] == (1, _PROBE_TOKENS):
            return at, value
    return None, None


def first_of(output: Any) -> Any:
    """A layer's output; the first element if it is a tuple."""
    return output[0] if isinstance(output, tuple) else output
