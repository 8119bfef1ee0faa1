"""Attention over rows: the function that transformers' models call instead of their own.

Before: batch.attention plans the blocks; the plan rides through the model's forward as the keyword ROW_PLAN.
Source of the formulas: scaled dot-product attention (Vaswani et al. 2017) and its backward, P * (dP - sum(dP * P)).
Letters: H heads, T tokens of the row, D head dimension; G segments of a block, n the longest, A tokens of their path.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from atomtune.batch.attention import AttentionPlan, Block

#: The name under which models find this function, and the keyword that carries the plan to it.
ROWS = "atomtune_rows"
ROW_PLAN = "atomtune_plan"


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one row by its plan; without a plan, the library's own.

    query [1, H, T, D], key and value [1, H', T, D] with H a multiple of H'
    Returns ([1, T, H, D], None).
    """
    plan: AttentionPlan | None = kwargs.pop(ROW_PLAN, None)
    if plan is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    heads = query.shape[1]
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if by_dense_mask(query, dropout):
        seen = plan.visible(sliding_window if sliding_window in plan.blocks else None)
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=dropout, scale=scaling
        )
        return out.transpose(1, 2).contiguous(), None
    out = _BlockAttention.apply(query[0], key[0], value[0], plan.blocks[sliding_window], plan.real, scaling)
    return out[None], None


def by_dense_mask(query: torch.Tensor, dropout: float) -> bool:
    """Whether one masked call serves better than blocks.

    A base that drops attention weights must draw them once. On CUDA one fused kernel over a mask was taken over many
    small products without a measurement; FlexAttention is to be measured there.
    """
    return dropout > 0 or query.is_cuda


def register() -> None:
    """Make the function known to transformers; harmless to repeat."""
    AttentionInterface.register(ROWS, attend)
    AttentionMaskInterface.register(ROWS, sdpa_mask)  # for batches without a plan: chat, padded rows


class _BlockAttention(torch.autograd.Function):
    """[H, T, D] x 3 → [T, H, D], block by block; the backward computes the weights again instead of keeping them."""

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd passes them by place
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        blocks: tuple[Block, ...],
        real: int,
        scaling: float,
    ) -> torch.Tensor:
        out = torch.empty(q.shape[1], q.shape[0], q.shape[2], dtype=q.dtype, device=q.device)  # [T, H, D]
        out[real:] = 0  # padding: no block writes it, and what lies in fresh memory may be NaN
        for block in blocks:
            view = _View(block, q, k, v)
            weights = view.weights(scaling)
            _put(out.transpose(0, 1), block, view.mix(weights))
        ctx.save_for_backward(q, k, v)
        ctx.blocks, ctx.real, ctx.scaling = blocks, real, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        grad = grad.transpose(0, 1)  # [H, T, D]
        # Every token stands once among the queries; a path's tokens gather gradients from every block below.
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_q[:, ctx.real :] = 0
        for block in ctx.blocks:
            view = _View(block, q, k, v)
            weights = view.weights(ctx.scaling)
            grad_out = view.laid(grad)
            if block.holds is not None:  # padding repeats a token, so it must not hand on that token's gradient
                grad_out = grad_out * block.holds.to(grad.dtype)
            scores = torch._softmax_backward_data(view.weights_gradient(grad_out), weights, -1, weights.dtype)
            _put(grad_q, block, view.query_gradient(scores))
            _add(grad_k, block, view.own(scores).mT @ view.stacked(view.q))
            _add(grad_v, block, view.own(weights).mT @ view.stacked(grad_out))
            if block.path is not None:
                _add_path(grad_k, block, view.above(scores).mT @ view.q)
                _add_path(grad_v, block, view.above(weights).mT @ grad_out)
        return grad_q.mul_(ctx.scaling), grad_k.mul_(ctx.scaling), grad_v, None, None, None


class _View:
    """One block's part of q, k and v: its segments laid under each other [H, G * n, D], and their path [H, A, D]."""

    def __init__(self, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.block = block
        self.q, self.k, self.v = self.laid(q), self.laid(k), self.laid(v)
        self.path_k = self.path_v = None
        if block.path is not None:
            self.path_k, self.path_v = _take(k, block.path), _take(v, block.path)
        self.length = self.path_k.shape[1] if self.path_k is not None else 0

    def laid(self, x: torch.Tensor) -> torch.Tensor:
        """[H, T, D] → [H, G * n, D]"""
        block = self.block
        if block.filled is None and isinstance(block.tokens, slice):
            return x[:, block.tokens]
        return x.index_select(1, block.slots)

    def stacked(self, x: torch.Tensor) -> torch.Tensor:
        """[H, G * n, D] → [H * G, n, D]"""
        return x.reshape(x.shape[0] * self.block.count, self.block.width, x.shape[-1])

    def own(self, weights: torch.Tensor) -> torch.Tensor:
        """The part of [H, G, n, A + n] that falls on the segments themselves, [H * G, n, n]."""
        return weights[..., self.length :].reshape(-1, self.block.width, self.block.width)

    def above(self, weights: torch.Tensor) -> torch.Tensor:
        """The part of [H, G, n, A + n] that falls on the path, [H, G * n, A]."""
        return weights[..., : self.length].reshape(weights.shape[0], -1, self.length)

    def weights(self, scaling: float) -> torch.Tensor:
        """softmax(q k / sqrt(D) + mask) [H, G, n, A + n], scaled and normed in float32 (float64 for float64)."""
        heads, block = self.q.shape[0], self.block
        shape = (heads, block.count, block.width)
        exact = torch.promote_types(self.q.dtype, torch.float32)
        mask = block.mask.to(exact)
        own = (self.stacked(self.q) @ self.stacked(self.k).mT).view(*shape, block.width)
        if self.path_k is None:
            scores = torch.add(mask, own, alpha=scaling)
        else:
            scores = torch.empty(*shape, self.length + block.width, dtype=exact, device=own.device)
            path = (self.q @ self.path_k.mT).view(*shape, self.length)
            torch.mul(path, scaling, out=scores[..., : self.length])
            torch.mul(own, scaling, out=scores[..., self.length :])
            scores[..., -mask.shape[-1] :] += mask
        return torch.softmax(scores, -1).to(self.q.dtype)

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """weights x values, [H, G * n, D]"""
        out = (self.own(weights) @ self.stacked(self.v)).view_as(self.q)
        return out if self.path_v is None else out.baddbmm_(self.above(weights), self.path_v)

    def weights_gradient(self, grad_out: torch.Tensor) -> torch.Tensor:
        """[H, G * n, D] → [H, G, n, A + n]"""
        heads, block = grad_out.shape[0], self.block
        own = (self.stacked(grad_out) @ self.stacked(self.v).mT).view(heads, block.count, block.width, block.width)
        if self.path_v is None:
            return own
        path = (grad_out @ self.path_v.mT).view(heads, block.count, block.width, self.length)
        return torch.cat([path, own], -1)

    def query_gradient(self, scores: torch.Tensor) -> torch.Tensor:
        """[H, G, n, A + n] → [H, G * n, D], without the scaling"""
        out = (self.own(scores) @ self.stacked(self.k)).view_as(self.q)
        return out if self.path_k is None else out.baddbmm_(self.above(scores), self.path_k)


def _take(x: torch.Tensor, where: slice | torch.Tensor) -> torch.Tensor:
    return x[:, where] if isinstance(where, slice) else x.index_select(1, where)


def _filled(block: Block, x: torch.Tensor) -> torch.Tensor:
    """The slots that hold a token, [..., N, D], from any [H * G, n, D] or [H, G * n, D]."""
    x = x.reshape(-1, block.count * block.width, x.shape[-1])
    return x if block.filled is None else x.index_select(1, block.filled)


def _put(out: torch.Tensor, block: Block, x: torch.Tensor) -> None:
    if isinstance(block.tokens, slice):
        out[:, block.tokens] = _filled(block, x)
    else:
        out.index_copy_(1, block.tokens, _filled(block, x))


def _add(out: torch.Tensor, block: Block, x: torch.Tensor) -> None:
    if isinstance(block.tokens, slice):
        out[:, block.tokens] += _filled(block, x)
    else:
        out.index_add_(1, block.tokens, _filled(block, x))


def _add_path(out: torch.Tensor, block: Block, x: torch.Tensor) -> None:
    if isinstance(block.path, slice):
        out[:, block.path] += x
    elif block.path is not None:
        out.index_add_(1, block.path, x)
