"""Fused norms: RMSNorm in few passes over memory, for training on a CPU.

In plain operations, a norm and its gradient take some twenty kernels over float32 copies; here they take six.
An RMSNorm is recognised by its results on random numbers, not by its name.
Formula: Zhang and Sennrich 2019, arXiv 1910.07467.
Letters: T tokens (times heads if every head has its norm), D width.
"""

import contextlib
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

#: Two correct ways to compute a norm differ by at most this many roundings.
_ROUNDINGS = 4


def fuse_norms(model: nn.Module) -> int:
    """Let a model's frozen RMSNorms compute in few passes; returns how many were changed."""
    fused = 0
    for norm in model.modules():
        offset = None if isinstance(norm, FusedNorm) else offset_of(norm)
        if offset is not None:
            # As in fused_lora, a change of class leaves modules, names and what is saved as they are.
            norm.__class__ = type(type(norm).__name__, (FusedNorm, type(norm)), {"offset": offset})
            fused += 1
    return fused


@torch.no_grad()
def offset_of(norm: nn.Module) -> float | None:
    """The number that a frozen RMSNorm adds to its weight (0, or 1 in Gemma); None for any other module."""
    weight, eps = getattr(norm, "weight", None), _eps(norm)
    if not isinstance(weight, nn.Parameter) or weight.requires_grad or weight.device.type != "cpu":
        return None
    if weight.dim() != 1 or len(list(norm.parameters())) > 1 or eps is None:
        return None
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    # Small enough that eps matters, and growing along the width, so that norms over groups or without the mean differ.
    x = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0))
    x = ((x + 1) * torch.linspace(0.1, 4, len(weight)) * eps**0.5).to(weight.dtype)
    output = None
    # A gated norm may need a second argument; Kimi Linear's has one that defaults to None, and fails without it.
    with contextlib.suppress(RuntimeError, TypeError, ValueError, AttributeError):
        output = norm(x)
    if not isinstance(output, torch.Tensor) or output.dtype != x.dtype or output.shape != x.shape:
        return None
    tolerance = _ROUNDINGS * torch.finfo(x.dtype).eps
    for offset in (0.0, 1.0):
        expected = functional.rms_norm(x.double(), weight.shape, weight.double() + offset, eps)
        if torch.allclose(output.double(), expected, rtol=tolerance, atol=0):
            return offset
    return None


def _eps(norm: nn.Module) -> float | None:
    """A norm's eps: variance_epsilon in most models, eps in Gemma and some others; None if there is none."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps if isinstance(eps, float) and eps > 0 else None


class FusedNorm(nn.Module):
    """First base class of a fused norm, before the norm's own class; it computes during training."""

    weight: nn.Parameter
    offset: float

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # As in fused_lora, evaluation uses the model's own code, which is what other programs load. The dtype is
        # compared because the models' own norms compute in float32 even if all else is float64.
        served = not (self.training or torch.is_grad_enabled())
        if served or args or kwargs or x.device.type != "cpu" or x.dtype != self.weight.dtype:
            return super().forward(x, *args, **kwargs)
        factors = self.weight.float() + self.offset if self.offset else self.weight
        return RmsNorm.apply(x, factors, _eps(self))


class RmsNorm(torch.autograd.Function):
    """x [..., D], frozen factors [D] → x / sqrt(mean(x^2) + eps) * factors, [..., D]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factors: torch.Tensor, eps: float) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()  # [T, D]
        width, exact = flat.shape[1], torch.promote_types(x.dtype, torch.float32)
        # The length of the vector (x, sqrt(D * eps)), which is sqrt(D) times the divisor of x.
        length = torch.linalg.vector_norm(flat, dim=1, keepdim=True, dtype=exact).square_().add_(width * eps).sqrt_()
        # The output must not be a view, because a model may change it in place.
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
        # g / |x| - x (g . x) / |x|^3 is also the gradient of weight normalisation (x / |x| times a scale, here 1).
        # torch has one kernel for that, without a public name.
        ones = torch.ones_like(length, dtype=flat.dtype)
        grad_x, _ = torch.ops.aten._weight_norm_interface_backward(grad_normed, flat, ones, length, 0)
        return grad_x.view(grad.shape), None, None
