"""RMSNorm in few passes over memory, for training on a CPU.

Written in plain operations, a norm and its gradient are some twenty kernels over float32 copies; here they are six.
A norm is known by what it computes, not by its name: each is tried on random numbers before it is changed.
Formula: Zhang and Sennrich 2019, arXiv 1910.07467.
Letters: T tokens (times heads, where every head has its norm), D width.
"""

import contextlib
import inspect
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

#: Two right ways to compute a norm differ by so many roundings at most.
_ROUNDINGS = 4


def fuse_norms(model: nn.Module) -> int:
    """Let a model's frozen RMSNorms compute in few passes; returns how many do."""
    fused = 0
    for norm in model.modules():
        offset = offset_of(norm)
        if offset is not None:
            # As in fused_lora, a change of class leaves modules, names and what is saved as they are.
            norm.__class__ = type(type(norm).__name__, (FusedNorm, type(norm)), {"offset": offset})
            fused += 1
    return fused


@torch.no_grad()
def offset_of(norm: nn.Module) -> float | None:
    """What a frozen RMSNorm adds to its weight (0; Gemma 1); None for a module that computes anything else."""
    weight, eps = getattr(norm, "weight", None), _eps(norm)
    if not isinstance(weight, nn.Parameter) or weight.requires_grad or weight.device.type != "cpu":
        return None
    if weight.dim() != 1 or len(list(norm.parameters())) > 1 or eps is None or not _takes_one_tensor(norm):
        return None
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    # So small that eps shows, and growing along the width: norms of groups, or of the width less its mean, differ.
    x = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0))
    x = ((x + 1) * torch.linspace(0.1, 4, len(weight)) * eps**0.5).to(weight.dtype)
    output = None
    # Kimi Linear's gate has a default of None and is needed all the same.
    with contextlib.suppress(RuntimeError, TypeError, ValueError, AttributeError):
        output = norm(x)
    if not isinstance(output, torch.Tensor) or output.dtype != x.dtype or output.shape != x.shape:
        return None
    tolerance = _ROUNDINGS * torch.finfo(x.dtype).eps
    for offset in (0.0, 1.0):
        expected = plain_norm(x.double(), weight.double() + offset, eps)
        if torch.allclose(output.double(), expected, rtol=tolerance, atol=0):
            return offset
    return None


def _eps(norm: nn.Module) -> float | None:
    """Most models call it variance_epsilon, Gemma and some others eps."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps if isinstance(eps, float) and eps > 0 else None


def _takes_one_tensor(norm: nn.Module) -> bool:
    """Whether forward needs one argument (a gated norm takes two)."""
    parameters = inspect.signature(norm.forward).parameters.values()
    return sum(parameter.default is inspect.Parameter.empty for parameter in parameters) == 1


def plain_norm(x: torch.Tensor, factors: torch.Tensor, eps: float) -> torch.Tensor:
    """The formula, [..., D] and [D] → [..., D]."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * factors


class FusedNorm(nn.Module):
    """Stands before a norm's own class; while the model trains, it computes."""

    weight: nn.Parameter
    offset: float

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # As in fused_lora, the model that is measured is bit for bit the model that others load. The models' own
        # norms are in float32 even where all else is in float64.
        served = not (self.training or torch.is_grad_enabled())
        if served or args or kwargs or x.device.type != "cpu" or x.dtype != self.weight.dtype:
            return super().forward(x, *args, **kwargs)
        factors = self.weight.float() + self.offset if self.offset else self.weight
        return RmsNorm.apply(x, factors, _eps(self))


class RmsNorm(torch.autograd.Function):
    """x [..., D], frozen factors [D] → x / sqrt(mean(x^2) + eps) * factors."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factors: torch.Tensor, eps: float) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()  # [T, D]
        width, exact = flat.shape[1], torch.promote_types(x.dtype, torch.float32)
        # The length of (x, sqrt(D * eps)): what x is divided by, times sqrt(D).
        length = torch.linalg.vector_norm(flat, dim=1, keepdim=True, dtype=exact).square_().add_(width * eps).sqrt_()
        # What is returned is no view: a model may change it in place.
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.mul(flat, width**0.5 / length, out=out.view(flat.shape)).mul_(factors)
        ctx.save_for_backward(flat, length, factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        flat, length, factors = ctx.saved_tensors
        flat_grad, width = grad.reshape(flat.shape), flat.shape[1]
        zero = flat.new_zeros(())
        grad_normed = torch.addcmul(zero, flat_grad, factors, value=width**0.5, out=torch.empty_like(flat))
        # g / |x| - x (g . x) / |x|^3 is also the gradient of weight normalisation (x / |x| times a scale, here 1), for
        # which torch has one kernel; without a public name.
        ones = torch.ones_like(length, dtype=flat.dtype)
        grad_x, _ = torch.ops.aten._weight_norm_interface_backward(grad_normed, flat, ones, length, 0)
        return grad_x.view(grad.shape), None, None
