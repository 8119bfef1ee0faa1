"""LoRA layers computed together: the ones that read the same tensor, in one step, without copies and casts.

Before: adapter.py wraps the base.  After: train.trainer.
PEFT's layers compute x A^T in the adapter's own dtype (float32), which casts every input and adds every output in one
more pass; q, k and v each do so for the same x. Here the layers of one input form a Family: one product with all A
stacked, every B added into its base's output in place, and one autograd node. The layers, their weights and what is
saved stay PEFT's; a case this does not know goes PEFT's own way. Formulas: Hu et al. 2021, arXiv 2106.09685.
Letters: T tokens, I inputs, O outputs, R the ranks of a family together.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.autograd.function import once_differentiable


def compute_together(families: Sequence[Sequence[LoraLinear]]) -> int:
    """Let each family of LoRA layers compute as one; returns how many layers do."""
    for members in families:
        family = Family(members)
        for layer in members:
            layer.forward = MethodType(family.call, layer)
    return sum(map(len, families))


def families_of(model: nn.Module, **example_inputs: Any) -> list[list[LoraLinear]]:
    """The LoRA layers of a model by the tensor they read, seen in one forward pass."""
    read: list[tuple[torch.Tensor, list[LoraLinear]]] = []

    def see(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if read and inputs[0] is read[-1][0]:
            read[-1][1].append(layer)
        else:
            read.append((inputs[0], [layer]))

    layers = [module for module in model.modules() if type(module) is LoraLinear and _is_plain(module)]
    if not layers:
        return []
    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    trained = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(**example_inputs)
    finally:
        model.train(trained)
        for hook in hooks:
            hook.remove()
    called = [id(layer) for _, members in read for layer in members]
    # A layer that is called more than once (shared weights, loops) has no single place: PEFT's own way.
    return [members for _, members in read if all(called.count(id(layer)) == 1 for layer in members)]


def _is_plain(layer: LoraLinear) -> bool:
    """Plain LoRA on a plain, frozen matrix: one adapter, no DoRA or other variant, no bias of its own."""
    base = layer.get_base_layer()
    return (
        type(base) is nn.Linear
        and base.weight.is_floating_point()
        and not base.weight.requires_grad
        and len(layer.active_adapters) == 1
        and not layer.lora_variant
        and layer.lora_B[layer.active_adapters[0]].bias is None
    )


class Family:
    """LoRA layers that read the same tensor. The first that is called computes for all."""

    def __init__(self, members: Sequence[LoraLinear]) -> None:
        self.members = tuple(members)
        self.read: torch.Tensor | None = None
        self.ready: dict[int, torch.Tensor] = {}

    def call(self, layer: LoraLinear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The forward of a member."""
        if self.read is x and id(layer) in self.ready:
            out = self.ready.pop(id(layer))
            if not self.ready:
                self.read = None
            return out
        # The model that is measured is, bit for bit, the model that any program with PEFT loads.
        served = not (layer.training or torch.is_grad_enabled())
        if served or args or kwargs or not all(_as_expected(member, x) for member in self.members):
            return LoraLinear.forward(layer, x, *args, **kwargs)
        outputs = self.compute(x)
        self.ready = {id(m): out for m, out in zip(self.members, outputs, strict=True) if m is not layer}
        self.read = x if self.ready else None
        return outputs[self.members.index(layer)]

    def compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = self.members[0]
        dropout = first.lora_dropout[first.active_adapters[0]]
        p = dropout.p if isinstance(dropout, nn.Dropout) and first.training else 0.0
        keep = keep_mask(x.flatten(0, -2), p) if p else None
        flat: list[torch.Tensor | None] = []
        for layer in self.members:
            name, base = layer.active_adapters[0], layer.get_base_layer()
            flat += [base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight]
        scales = tuple(layer.scaling[layer.active_adapters[0]] for layer in self.members)
        return _LowRank.apply(x, keep, p, scales, *flat)


def _as_expected(layer: LoraLinear, x: torch.Tensor) -> bool:
    """Whether this call is the plain one: an adapter in use, nothing merged, one dtype throughout."""
    weight = layer.get_base_layer().weight
    autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) != x.dtype
    return not (layer.disable_adapters or layer.merged or autocast) and x.dtype == weight.dtype


def keep_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """[T, I] bool, False with probability p (to 1 / 65,536 on a CPU).

    A CPU draws random numbers one after the other; one draw of 64 bits serves four elements here.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    lanes = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return lanes >= round(p * 65_536) - 32_768


class _LowRank(torch.autograd.Function):
    """x, and per layer W [O, I], bias, A [r, I], B [O, r] → per layer x W^T + bias + scale * (drop(x) A^T) B^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        keep: torch.Tensor | None,
        p: float,
        scales: tuple[float, ...],
        *weights: Any,
    ) -> tuple[torch.Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])  # [T, I]
        bases, biases, downs, ups = weights[0::4], weights[1::4], weights[2::4], weights[3::4]
        down = torch.cat([a.to(x.dtype) for a in downs])  # [R, I]
        up = [(b * scale).to(x.dtype) for b, scale in zip(ups, scales, strict=True)]  # each [O, r]
        low = (_dropped(flat, keep, p) @ down.T).split([b.shape[1] for b in up], dim=1)  # each [T, r]
        outputs = []
        for base, bias, b, h in zip(bases, biases, up, low, strict=True):
            out = nn.functional.linear(flat, base, bias).addmm_(h, b.T)  # [T, O]
            outputs.append(out.view(*x.shape[:-1], -1))
        ctx.save_for_backward(flat, keep, down, *up, *low, *bases)
        ctx.p, ctx.scales, ctx.dtype, ctx.shape = p, scales, downs[0].dtype, x.shape
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        n = len(ctx.scales)
        flat, keep, down, *rest = ctx.saved_tensors
        up, low, bases = rest[:n], rest[n : 2 * n], rest[2 * n :]
        grad_x: torch.Tensor | None = None
        grad_low: list[torch.Tensor] = []
        grad_up: list[torch.Tensor | None] = []
        for grad, b, h, base, scale in zip(grads, up, low, bases, ctx.scales, strict=True):
            if grad is None:  # an output nobody used
                grad_low.append(torch.zeros_like(h))
                grad_up.append(None)
                continue
            g = grad.reshape(-1, grad.shape[-1])  # [T, O]
            grad_low.append(g @ b)
            grad_up.append((h.T @ g).T.to(ctx.dtype) * scale)  # twice as fast as g.T @ h
            if ctx.needs_input_grad[0]:
                grad_x = g @ base if grad_x is None else grad_x.addmm_(g, base)
        together = torch.cat(grad_low, 1)  # [T, R]
        grad_down = (together.T @ _dropped(flat, keep, ctx.p)).to(ctx.dtype).split([h.shape[1] for h in low])
        if grad_x is not None:
            if keep is None:
                grad_x.addmm_(together, down)
            else:
                grad_x += _dropped(together @ down, keep, ctx.p)
            grad_x = grad_x.view(ctx.shape)
        per_layer = [one for a, b in zip(grad_down, grad_up, strict=True) for one in (None, None, a, b)]
        return grad_x, None, None, None, *per_layer


def _dropped(x: torch.Tensor, keep: torch.Tensor | None, p: float) -> torch.Tensor:
    return x if keep is None else x * keep * (1 / (1 - p))
