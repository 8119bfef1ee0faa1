"""Span attention: on a GPU, one call of a flash kernel for sequences of many lengths.

batch.attention_plan chooses the spans. The queries of a span are one segment of the row; its keys are the path above it
and the segment itself, causally aligned at the lower right corner. The keys of a shared path are gathered once for
each segment below it. That costs memory traffic but no arithmetic: each query meets exactly the keys it may see.

    path of 3, segment of 2      p p p b b
                            b0   1 1 1 1 .
                            b1   1 1 1 1 1

If the kernel is not usable (a CPU, an old GPU, float32, soft caps), the same is computed in plain torch, span by span.
Letters: T tokens, H heads, H' key and value heads, D head dimension of queries and keys, D' of values, K gathered keys.
"""

from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from atomtune.batch.spans import Spans
from atomtune.model.scores import ScoreRules

#: The widest head that torch's flash kernel accepts, and the step of its widths.
_WIDEST_HEAD, _HEAD_STEP = 256, 8
#: The oldest generation of GPUs on which the kernel runs: Ampere. A V100 has 7.0, a T4 7.5.
_OLDEST_GENERATION = 8


def flash_takes(q: torch.Tensor, v: torch.Tensor, rules: ScoreRules) -> bool:
    """Whether torch's flash kernel supports such heads on their device."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    fits = half and rules.softcap is None and max(q.shape[-1], v.shape[-1]) <= _WIDEST_HEAD
    return q.is_cuda and fits and torch.cuda.get_device_capability(q.device)[0] >= _OLDEST_GENERATION


class SpanAttention(torch.autograd.Function):
    """q [T, H, D], k [T, H', D], v [T, H', D'], sinks [H] or None → [T, H, D'].

    Query head h uses key head h // (H / H').
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd passes them by position
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        spans: Spans,
        window: int | None,
        rules: ScoreRules,
    ) -> torch.Tensor:
        kernel = _Flash if flash_takes(q, v, rules) else _Plain
        out, logsumexp = kernel.forward(q, _gathered(k, spans), _gathered(v, spans), spans, window, rules)
        if sinks is not None:
            # A sink is a further key with the value zero: it takes its share of the softmax and adds nothing.
            total = torch.logaddexp(logsumexp, sinks[:, None].to(logsumexp.dtype))  # [H, T]
            out = out * (logsumexp - total).exp().T[..., None].to(out.dtype)
            logsumexp = total
        ctx.save_for_backward(q, k, v, sinks, out, logsumexp)
        ctx.kernel, ctx.spans, ctx.window, ctx.rules = kernel, spans, window, rules
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, out, logsumexp = ctx.saved_tensors
        spans = ctx.spans
        grad = grad.contiguous()
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            sink_share = (sinks[:, None].to(logsumexp.dtype) - logsumexp).exp()  # [H, T]
            grad_sinks = -(sink_share.T * (grad * out).sum(-1)).sum(0).to(sinks.dtype)
        grad_q, grad_k, grad_v = ctx.kernel.backward(
            grad, q, _gathered(k, spans), _gathered(v, spans), out, logsumexp, spans, ctx.window, ctx.rules
        )
        return grad_q, _scattered(grad_k, k, spans), _scattered(grad_v, v, spans), grad_sinks, None, None, None


def _gathered(x: torch.Tensor, spans: Spans) -> torch.Tensor:
    """[T, H', D] by token → [K, H', D] by gathered key."""
    return x if spans.keys is None else x.index_select(0, spans.keys)


def _scattered(grad: torch.Tensor, like: torch.Tensor, spans: Spans) -> torch.Tensor:
    """[K, H', D] by gathered key → [T, H', D]: a token's gradient is the sum over all spans that read it."""
    if spans.keys is None:
        return grad
    # Summed in float32: hundreds of spans may read one shared prefix, and bfloat16 would round after each addition.
    exact = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros(like.shape, dtype=exact, device=like.device)
    return total.index_add_(0, spans.keys, grad.to(exact)).to(like.dtype)


class _Flash:
    """torch's own flash kernel (Dao 2023, arXiv 2307.08691).

    Called by its ATen name: the public torch.nn.attention.varlen has no gradient for the log-sum-exp, which sinks need,
    and autograd would sum the gradients of gathered keys in bfloat16.
    """

    @staticmethod
    def forward(  # noqa: PLR0917
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None, rules: ScoreRules
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ([T, H, D'], log-sum-exp [H, T] in float32)."""
        width = _common_width(q, v)
        out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
            _widened(q, width), _widened(k, width), _widened(v, width), spans.query_starts, spans.key_starts,
            spans.longest_queries, spans.longest_keys, 0.0, True, False,
            scale=rules.scaling, window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )  # fmt: skip
        return out[..., : v.shape[-1]], logsumexp

    @staticmethod
    def backward(  # noqa: PLR0917
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
        logsumexp: torch.Tensor, spans: Spans, window: int | None, rules: ScoreRules,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        width = _common_width(q, v)
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
            _widened(grad, width), _widened(q, width), _widened(k, width), _widened(v, width), _widened(out, width),
            logsumexp.contiguous(), spans.query_starts, spans.key_starts, spans.longest_queries, spans.longest_keys,
            0.0, True, *no_dropout,
            scale=rules.scaling, window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )  # fmt: skip
        return grad_q[..., : q.shape[-1]], grad_k[..., : k.shape[-1]], grad_v[..., : v.shape[-1]]


def _common_width(q: torch.Tensor, v: torch.Tensor) -> int:
    """The kernel needs one width for queries, keys and values: the larger one, rounded up to a multiple of 8."""
    return -(-max(q.shape[-1], v.shape[-1]) // _HEAD_STEP) * _HEAD_STEP


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    """Pad each head with zeros, which change no product."""
    return x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1]))


class _Plain:
    """The same in plain torch, span by span, in float32 or float64."""

    @staticmethod
    def forward(  # noqa: PLR0917
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None, rules: ScoreRules
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ([T, H, D'], log-sum-exp [H, T])."""
        exact = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(*q.shape[:-1], v.shape[-1])  # [T, H, D']
        logsumexp = q.new_empty(q.shape[1], q.shape[0], dtype=exact)  # [H, T]
        for queries, keys in _stretches(spans):
            scores, _ = _scores(q[queries], k[keys], window, rules)  # [H, q, k]
            logsumexp[:, queries] = scores.logsumexp(-1)
            values = _by_query_head(v[keys], q.shape[1])  # [H, k, D']
            out[queries] = (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype)
        return out, logsumexp

    @staticmethod
    def backward(  # noqa: PLR0917
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
        logsumexp: torch.Tensor, spans: Spans, window: int | None, rules: ScoreRules,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        heads = q.shape[1]
        for queries, keys in _stretches(spans):
            scores, slope = _scores(q[queries], k[keys], window, rules)
            weights = (scores - logsumexp[:, queries, None]).exp()  # P [H, q, k]
            grad_here = grad[queries].transpose(0, 1).to(weights.dtype)  # dO [H, q, D']
            grad_weights = grad_here @ _by_query_head(v[keys], heads).mT  # dP
            sums = (grad_here * out[queries].transpose(0, 1)).sum(-1, keepdim=True)  # sum(dP * P), from the output
            grad_scores = weights * (grad_weights - sums)  # dS
            if slope is not None:
                grad_scores = grad_scores * slope
            grad_scores = grad_scores * rules.scaling
            queries_here = q[queries].transpose(0, 1).to(weights.dtype)  # [H, q, D]
            grad_q[queries] = (grad_scores @ _by_query_head(k[keys], heads)).transpose(0, 1).to(q.dtype)
            grad_k[keys] = _by_key_head(grad_scores.mT @ queries_here, k.shape[1]).to(k.dtype)
            grad_v[keys] = _by_key_head(weights.mT @ grad_here, v.shape[1]).to(v.dtype)
        return grad_q, grad_k, grad_v


def _stretches(spans: Spans) -> list[tuple[slice, slice]]:
    """(queries, gathered keys) of each span, as slices."""
    queries, keys = spans.query_starts.tolist(), spans.key_starts.tolist()
    pairs = zip(pairwise(queries), pairwise(keys), strict=True)
    return [(slice(*of_queries), slice(*of_keys)) for of_queries, of_keys in pairs]


def _scores(
    q: torch.Tensor, k: torch.Tensor, window: int | None, rules: ScoreRules
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """For one span, q [q, H, D] and k [k, H', D] → masked scores [H, q, k], and the slope of the soft cap or None."""
    exact = torch.promote_types(q.dtype, torch.float32)
    products = q.transpose(0, 1).to(exact) @ _by_query_head(k, q.shape[1]).mT
    scores, slope = rules.capped(products * rules.scaling)
    distance = (
        torch.arange(len(q), device=q.device)[:, None] + (len(k) - len(q)) - torch.arange(len(k), device=q.device)
    )
    hidden = distance < 0
    if window is not None:
        hidden = hidden | (distance >= window)
    return scores.masked_fill(hidden, -torch.inf), slope


def _by_query_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[k, H', D] → [H, k, D] in float32 or float64; each key head is repeated for its H / H' query heads."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return x.transpose(0, 1).to(exact).repeat_interleave(heads // x.shape[1], dim=0)


def _by_key_head(grad: torch.Tensor, key_heads: int) -> torch.Tensor:
    """[H, k, D] → [k, H', D], summed over the query heads of each key head."""
    return grad.view(key_heads, -1, *grad.shape[1:]).sum(1).transpose(0, 1)
