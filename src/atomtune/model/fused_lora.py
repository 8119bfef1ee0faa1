"""Fused LoRA: layers that read the same tensor compute together, without copies and casts.

PEFT's layers compute x A^T in the adapter's own dtype (float32): each casts its input and adds its output in a further
pass, and q, k and v all do so for the same x. Here layers with the same input form a group: one product with all A
stacked, every B added into its base layer's output in place, and one autograd node. The layers, their weights and what
is saved stay PEFT's. Any case that is not recognised is computed by PEFT. Formulas: Hu et al. 2021, arXiv 2106.09685.
Letters: T tokens, I inputs, O outputs, r the rank of a layer, R the sum of the ranks in a group.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.autograd.function import once_differentiable

from atomtune.model.modes import without_dropout


def compute_together(model: nn.Module, **example_inputs: Any) -> int:
    """Let the LoRA layers that read the same tensor compute together; returns how many layers do.

    The weights of all groups are cast together at the start of each forward of the model.
    """
    groups = [Group(members) for members in groups_of(model, **example_inputs)]
    for group in groups:
        for layer in group.members:
            # PEFT has no public way to replace a layer's computation (a variant only gets the base's finished output).
            # A change of class, as in FSDP2, leaves modules, names and what is saved as they are.
            layer.__class__ = GroupedLora
            layer.group = group
    if groups:
        model.register_forward_pre_hook(Casts(groups).refresh)
    return sum(len(group.members) for group in groups)


def groups_of(model: nn.Module, **example_inputs: Any) -> list[list[LoraLinear]]:
    """LoRA layers grouped by the tensor they read, which is observed in one forward pass."""
    layers = [module for module in model.modules() if type(module) is LoraLinear and _is_plain(module)]
    if not layers:
        return []
    calls: list[tuple[torch.Tensor, LoraLinear]] = []  # in the order of the forward pass

    def note(layer: LoraLinear, inputs: tuple[Any, ...]) -> None:
        calls.append((inputs[0], layer))

    with contextlib.ExitStack() as hooks, without_dropout(model), torch.no_grad():
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(note))
        model(**example_inputs)
    # A layer that is called more than once (shared weights, loops) belongs to no single group; PEFT computes it.
    times_called = Counter(layer for _, layer in calls)
    groups: list[list[LoraLinear]] = []
    for _, same_input in groupby(calls, key=lambda call: id(call[0])):  # all inputs are still alive, so ids are unique
        members = [layer for _, layer in same_input]
        if all(times_called[layer] == 1 for layer in members):
            groups.append(members)
    return groups


def _is_plain(layer: LoraLinear) -> bool:
    """Plain LoRA on a frozen nn.Linear: one active adapter, no DoRA or other variant, no bias in B."""
    base = layer.get_base_layer()
    return (
        type(base) is nn.Linear
        and not any(weight.requires_grad for weight in base.parameters())  # some adapters train the base's bias
        and len(layer.active_adapters) == 1
        and not layer.lora_variant
        and layer.lora_B[layer.active_adapters[0]].bias is None
    )


class GroupedLora(LoraLinear):
    """PEFT's layer, computed by its group during training."""

    group: "Group"

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Evaluation uses PEFT's own code, so that the measured model is, bit for bit, the one that other programs load.
        served = not (self.training or torch.is_grad_enabled())
        if served or args or kwargs or not self.group.computes(x):
            return super().forward(x, *args, **kwargs)
        return self.group.output_of(self, x)


class Group:
    """LoRA layers that read the same tensor. The first one called computes the outputs of all."""

    def __init__(self, members: Sequence[LoraLinear]) -> None:
        self.members = tuple(members)
        self.cast: Cast | None = None
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}  # by id of the members that have not been called yet

    def computes(self, x: torch.Tensor) -> bool:
        """Whether the fused computation applies: adapters enabled and not merged, one dtype, no autocast to another."""
        autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) != x.dtype
        return not autocast and all(
            not layer.disable_adapters and not layer.merged and layer.get_base_layer().weight.dtype == x.dtype
            for layer in self.members
        )

    def output_of(self, layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        """A member's output: x [..., I] → [..., O]."""
        if self._input is not x or id(layer) not in self._outputs:
            outputs = self._compute(x)
            self._outputs = {id(member): output for member, output in zip(self.members, outputs, strict=True)}
        output = self._outputs.pop(id(layer))
        self._input = x if self._outputs else None
        return output

    def _compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = self.members[0]
        dropout = first.lora_dropout[first.active_adapters[0]]
        p = dropout.p if isinstance(dropout, nn.Dropout) and first.training else 0.0
        keep = keep_mask(x.flatten(0, -2), p) if p else None
        if self.cast is None or not self.cast.is_of(self):
            self.cast = cast_together([self])[0]
        weights: list[torch.Tensor | None] = []
        for layer in self.members:
            base = layer.get_base_layer()
            weights += [base.weight, base.bias, *_matrices(layer)]
        return _LowRank.apply(x, keep, p, self.cast, *weights)


def _matrices(layer: LoraLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, I] and B [O, r]."""
    name = layer.active_adapters[0]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


@dataclass(frozen=True, slots=True)
class Cast:
    """A group's weights, cast to the dtype of its input.

    down      [R, I] the A of all layers, stacked
    ups       each layer's B times its scaling, [O, r]
    scales    each layer's scaling
    versions  of the weights when they were cast
    """

    down: torch.Tensor
    ups: tuple[torch.Tensor, ...]
    scales: tuple[float, ...]
    versions: tuple[int, ...]

    @property
    def ranks(self) -> list[int]:
        return [up.shape[1] for up in self.ups]

    def is_of(self, group: Group) -> bool:
        """Whether the group's weights have not changed since the cast."""
        return self.versions == _versions(group)


def _versions(group: Group) -> tuple[int, ...]:
    """Version counters of a group's weights; they grow with every in-place change, except by torch's fused optimizers.

    After such a step the next forward of the whole model casts again in any case (`Casts.refresh`).
    """
    return tuple(weight._version for layer in group.members for weight in _matrices(layer))


class Casts:
    """Casts the weights of all groups at the start of a forward of the whole model.

    Cast layer by layer, that took 1,200 small kernels per step on a 7B model; together it takes a handful. Recomputed
    layers use the same copies in the backward pass, because no weight changes between a forward and its backward.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        #: Groups by (device, dtype); their copies share one tensor.
        self._alike: dict[tuple[torch.device, torch.dtype], list[Group]] = {}
        for group in groups:
            weight = group.members[0].get_base_layer().weight
            self._alike.setdefault((weight.device, weight.dtype), []).append(group)

    def refresh(self, model: nn.Module, _inputs: Any) -> None:
        """Cast the weights again; a forward pre-hook of the model."""
        if not (model.training or torch.is_grad_enabled()):
            return  # PEFT's own layers compute then
        for groups in self._alike.values():
            for group, cast in zip(groups, cast_together(groups), strict=True):
                group.cast = cast


@torch.no_grad()
def cast_together(groups: Sequence[Group]) -> list[Cast]:
    """Cast the weights of groups on one device to the dtype of their base: one copy for all A, one for all B."""
    layers = [layer for group in groups for layer in group.members]
    dtype = layers[0].get_base_layer().weight.dtype
    downs, ups = zip(*map(_matrices, layers), strict=True)
    scales = [float(layer.scaling[layer.active_adapters[0]]) for layer in layers]
    # Flat and concatenated, in the order of the layers: one cast for all A, one for all B.
    all_downs = torch.cat([down.flatten() for down in downs]).to(dtype)  # [sum of r * I]
    all_ups = _scaled_together(ups, scales).to(dtype)  # [sum of O * r]
    flat_ups = all_ups.split([up.numel() for up in ups])
    ups = tuple(flat.view_as(up) for flat, up in zip(flat_ups, ups, strict=True))
    casts: list[Cast] = []
    first_layer = first_number = 0
    for group in groups:
        layers_end = first_layer + len(group.members)
        inputs = downs[first_layer].shape[1]
        # The A of a group are adjacent in memory, so they are one matrix without a further copy.
        numbers = sum(down.numel() for down in downs[first_layer:layers_end])
        down = all_downs.narrow(0, first_number, numbers).view(-1, inputs)  # [R, I]
        scales_here = tuple(scales[first_layer:layers_end])
        casts.append(Cast(down, ups[first_layer:layers_end], scales_here, _versions(group)))
        first_layer, first_number = layers_end, first_number + numbers
    return casts


def _scaled_together(ups: Sequence[torch.Tensor], scales: Sequence[float]) -> torch.Tensor:
    """Every B times its scaling, flat and concatenated; nearly always all scalings are equal."""
    if len(set(scales)) == 1:
        return torch.cat([up.flatten() for up in ups]).mul_(scales[0])
    return torch.cat([up.flatten() * scale for up, scale in zip(ups, scales, strict=True)])


def keep_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """[T, I] bool, False with probability p (rounded to 1 / 65,536 on a CPU).

    A CPU draws random numbers one after another, so one draw of 64 bits serves four elements here.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    lanes = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return lanes >= round(p * 65_536) - 32_768


class _LowRank(torch.autograd.Function):
    """x and, per layer, W [O, I], bias, A [r, I], B [O, r] → per layer, x W^T + bias + scale * (drop(x) A^T) B^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        keep: torch.Tensor | None,
        p: float,
        cast: Cast,
        *weights: Any,
    ) -> tuple[torch.Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])  # [T, I]
        bases, biases, downs = weights[0::4], weights[1::4], weights[2::4]
        lows = (_dropped(flat, keep, p) @ cast.down.T).split(cast.ranks, dim=1)  # each [T, r]
        outputs = []
        for base, bias, up, low in zip(bases, biases, cast.ups, lows, strict=True):
            out = nn.functional.linear(flat.view(x.shape), base, bias)  # [..., O]
            # The output must not be a view, because a model may change it in place (Gemma 3n does).
            out.view(-1, out.shape[-1]).addmm_(low, up.T)
            outputs.append(out)
        ctx.save_for_backward(flat, keep, cast.down, *cast.ups, *lows, *bases)
        ctx.p, ctx.scales, ctx.dtype, ctx.shape = p, cast.scales, downs[0].dtype, x.shape
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        n = len(ctx.scales)  # layers of the group
        flat, keep, down, *of_layers = ctx.saved_tensors
        # Per layer: scaled B [O, r], x A^T [T, r], W [O, I].
        ups, lows, bases = of_layers[:n], of_layers[n : 2 * n], of_layers[2 * n :]
        flat_grads = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]  # each [T, O]
        # An output that nothing used has no gradient. d(x A^T) = dY times the scaled B, each [T, r].
        grad_lows = [
            torch.zeros_like(low) if grad is None else grad @ up
            for grad, up, low in zip(flat_grads, ups, lows, strict=True)
        ]
        grad_low = torch.cat(grad_lows, 1)  # [T, R]
        grad_down = (grad_low.T @ _dropped(flat, keep, ctx.p)).to(ctx.dtype)  # dA of all layers, stacked [R, I]
        grad_downs = grad_down.split([low.shape[1] for low in lows])  # each [r, I]
        # dB = scale * dY^T (x A^T), each [O, r]
        grad_ups = [
            None if grad is None else (low.T @ grad).T.to(ctx.dtype) * scale  # twice as fast as grad.T @ low
            for grad, low, scale in zip(flat_grads, lows, ctx.scales, strict=True)
        ]
        grad_x: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            # dx = the sum of dY W over the layers + d(x A^T) A, masked like x
            grad_x = _input_gradient(flat_grads, bases)  # [T, I]
            if keep is None:
                grad_x.addmm_(grad_low, down)
            else:
                grad_x += _dropped(grad_low @ down, keep, ctx.p)
            grad_x = grad_x.view(ctx.shape)
        per_layer: list[torch.Tensor | None] = []
        for layer_down, layer_up in zip(grad_downs, grad_ups, strict=True):
            per_layer += [None, None, layer_down, layer_up]
        return grad_x, None, None, None, *per_layer


def _input_gradient(grads: Sequence[torch.Tensor | None], bases: Sequence[torch.Tensor]) -> torch.Tensor:
    """Per layer, the output's gradient [T, O] and the frozen matrix [O, I] → the sum of the input gradients [T, I]."""
    total: torch.Tensor | None = None
    for grad, base in zip(grads, bases, strict=True):
        if grad is not None:
            total = grad @ base if total is None else total.addmm_(grad, base)
    assert total is not None, "a backward without any gradient"
    return total


def _dropped(x: torch.Tensor, keep: torch.Tensor | None, p: float) -> torch.Tensor:
    return x if keep is None else x * keep * (1 / (1 - p))
