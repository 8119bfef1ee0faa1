"""Attention over rows: the function that transformers' models call instead of their own.

Before: batch.attention_plan plans the blocks; the plan rides through the model's forward as the keyword ROW_PLAN.
Source of the formulas: scaled dot-product attention (Vaswani et al. 2017) and its backward, P * (dP - sum(dP * P)).
Letters: H heads, T tokens of the row, D head dimension; G segments of a block, n the longest, A tokens of their path.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from atomtune.batch.attention_plan import AttentionPlan, Block, Places, Siblings, Where

#: The name under which models find this function, and the keyword that carries the plan to it.
ROWS = "atomtune_rows"
ROW_PLAN = "atomtune_plan"
#: Tokens of the longest row that gets a dense mask on a GPU: 64 MiB of booleans, 128 as the kernel's bfloat16 bias.
MOST_MASKED = 8192
#: What some models' attention does beside a softmax over q k: they hand it over under these keywords.
_MORE_THAN_SOFTMAX = {
    "softcap": "soft-capped attention scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}


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
    Returns ([1, T, H, D], None). Raises NotImplementedError where the layer asks for more than a softmax over a plan.
    """
    plan: AttentionPlan | None = kwargs.pop(ROW_PLAN, None)
    if plan is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name, said in _MORE_THAN_SOFTMAX.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(said)
    if sliding_window not in plan.blocks:
        raise NotImplementedError(f"a window of {sliding_window} tokens that the config does not name")
    heads = query.shape[1]
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if by_dense_mask(query, dropout):
        seen = plan.visible(sliding_window)
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=dropout, scale=scaling
        )
        return out.transpose(1, 2).contiguous(), None
    blocks, places = plan.blocks[sliding_window].each, plan.places(sliding_window, heads)
    out = _BlockAttention.apply(query[0], key[0], value[0], blocks, places, scaling)
    return out.transpose(0, 1)[None], None


def by_dense_mask(query: torch.Tensor, dropout: float) -> bool:
    """Whether one masked call serves better than blocks.

    A base that drops attention weights must draw them once. On CUDA one fused kernel over a mask was taken over many
    small products without a measurement, up to a length: the mask grows with its square, and blocks do not.
    """
    return dropout > 0 or (query.is_cuda and query.shape[-2] <= MOST_MASKED)


def register() -> None:
    """Make the function known to transformers; harmless to repeat."""
    AttentionInterface.register(ROWS, attend)
    AttentionMaskInterface.register(ROWS, sdpa_mask)  # for batches without a plan: chat, padded rows


class _BlockAttention(torch.autograd.Function):
    """[H, T, D] x 3 → [H, T, D], block by block; the backward computes the weights again instead of keeping them.

    In between block stands behind block, each [H, G * n, D]: together [H * S, D] for S slots.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd passes them by place
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        blocks: tuple[Siblings, ...],
        places: Places,
        scaling: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.blocks, ctx.places, ctx.scaling = blocks, places, scaling
        slot_q, slot_k, slot_v = _laid(q * scaling, places), _laid(k, places), _laid(v, places)
        k, v = k.contiguous(), v.contiguous()
        out = torch.empty_like(slot_q)
        for siblings in blocks:
            path_k, path_v = _take(k, siblings.path), _take(v, siblings.path)
            for view in (_View(block, siblings.above, len(q)) for block in siblings.blocks):
                weights = view.weights(slot_q, slot_k, path_k)
                torch.bmm(view.own(weights), view.segments(slot_v), out=view.segments(out))
                if view.path:
                    view.slots(out).baddbmm_(view.above(weights), path_v[:, : view.path])
        return _by_token(out, places, q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        places = ctx.places
        slot_q, slot_k, slot_v = _laid(q * ctx.scaling, places), _laid(k, places), _laid(v, places)
        # Padding repeats a token, so it must not hand on that token's gradient.
        slot_grad = _laid(grad, places).mul_(places.holds)
        k, v = k.contiguous(), v.contiguous()
        own_q, own_k, own_v = torch.empty_like(slot_q), torch.empty_like(slot_k), torch.empty_like(slot_v)
        above = []  # a path's tokens gather gradients from all blocks below
        for siblings in ctx.blocks:
            path_k, path_v = _take(k, siblings.path), _take(v, siblings.path)
            into_k, into_v = q.new_zeros(2, len(q), q.shape[-1], path_k.shape[1])  # [H, D, A]
            above.append((siblings.path, into_k, into_v))
            for view in (_View(block, siblings.above, len(q)) for block in siblings.blocks):
                weights = view.weights(slot_q, slot_k, path_k)
                scores = view.products(slot_grad, slot_v, path_v)
                scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype)
                torch.bmm(view.own(scores), view.segments(slot_k), out=view.segments(own_q))
                torch.bmm(view.own(scores).mT, view.segments(slot_q), out=view.segments(own_k))
                torch.bmm(view.own(weights).mT, view.segments(slot_grad), out=view.segments(own_v))
                if view.path:
                    view.slots(own_q).baddbmm_(view.above(scores), path_k[:, : view.path])
                    into_k[..., : view.path].add_(view.slots(slot_q).mT @ view.above(scores))
                    into_v[..., : view.path].add_(view.slots(slot_grad).mT @ view.above(weights))
        grad_q, grad_k, grad_v = (_by_token(x, places, q.shape) for x in (own_q, own_k, own_v))
        for path, into_k, into_v in above:
            _add(grad_k, path, into_k.mT)
            _add(grad_v, path, into_v.mT)
        return grad_q.mul_(ctx.scaling), grad_k, grad_v, None, None, None


def _laid(x: torch.Tensor, places: Places) -> torch.Tensor:
    """[H, T, D] by token → [H * S, D] by block."""
    return x.transpose(0, 1).reshape(-1, x.shape[-1]).index_select(0, places.gather)


def _by_token(x: torch.Tensor, places: Places, shape: torch.Size) -> torch.Tensor:
    """[H * S, D] by block → [H, T, D] by token, zero where the row is padding; in memory the tokens come first."""
    heads, tokens, width = shape
    out = x.new_empty(tokens * heads, width)
    torch.index_select(x, 0, places.back, out=out[: len(places.back)])
    out[len(places.back) :].zero_()
    return out.view(tokens, heads, width).transpose(0, 1)


def _add(x: torch.Tensor, path: Where | None, part: torch.Tensor) -> None:
    if isinstance(path, torch.Tensor):
        x.index_add_(1, path, part)
    elif path is not None:
        x[:, path].add_(part)


def _take(x: torch.Tensor, path: Where | None) -> torch.Tensor:
    """[H, T, D] → [H, A, D], its rows together in memory."""
    if path is None:
        return x[:, :0]
    return x.index_select(1, path) if isinstance(path, torch.Tensor) else x[:, path]


@dataclass(frozen=True, slots=True)
class _View:
    """How one block lies in the tensors of all slots. Its weights are [H * G, n, A + n]: [path | the segment]."""

    block: Block
    visible: int  # tokens of the path that are seen; what fills it up to A is seen by nobody
    heads: int

    @property
    def path(self) -> int:
        return self.block.path

    def slots(self, x: torch.Tensor) -> torch.Tensor:
        """[H * S, D] → [H, G * n, D]"""
        first, size = self.block.first, self.block.count * self.block.width
        return x[self.heads * first : self.heads * (first + size)].view(self.heads, size, -1)

    def segments(self, x: torch.Tensor) -> torch.Tensor:
        """[H * S, D] → [H * G, n, D]"""
        return self.slots(x).view(self.heads * self.block.count, self.block.width, -1)

    def own(self, weights: torch.Tensor) -> torch.Tensor:
        """[H * G, n, A + n] → [H * G, n, n]"""
        return weights[..., self.path :]

    def above(self, weights: torch.Tensor) -> torch.Tensor:
        """[H * G, n, A + n] → [H, G * n, A]"""
        return weights.view(self.heads, -1, weights.shape[-1])[..., : self.path]

    def products(self, slots_a: torch.Tensor, slots_b: torch.Tensor, path_b: torch.Tensor) -> torch.Tensor:
        """Each of the block's slots in a with the path and the segment's own slots in b, [H * G, n, A + n]."""
        a, b = self.segments(slots_a), self.segments(slots_b)
        out = a.new_empty(len(a), self.block.width, self.path + self.block.width)
        torch.bmm(a, b.mT, out=self.own(out))
        if self.path:
            torch.bmm(self.slots(slots_a), path_b[:, : self.path].mT, out=self.above(out))
        return out

    def weights(self, slot_q: torch.Tensor, slot_k: torch.Tensor, path_k: torch.Tensor) -> torch.Tensor:
        """softmax(q k + mask) of scaled queries; the softmax itself is computed in float32 at least."""
        scores = self.products(slot_q, slot_k, path_k)
        mask = self.block.mask.to(scores.dtype)
        if self.path > self.visible:
            scores[..., self.visible : self.path] = -torch.inf
        if mask.shape[-1] > self.block.width:
            scores[..., : self.visible].add_(mask[:, : self.visible])
        self.own(scores).add_(mask[:, -self.block.width :])
        return torch._softmax(scores, -1, half_to_float=False)
