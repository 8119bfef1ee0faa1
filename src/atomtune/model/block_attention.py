"""Attention by blocks, for a CPU: a few dense products instead of a T x T mask.

batch.blocks chooses the blocks. Forward: P = softmax(S), O = P V. Backward: dP = dO V^T,
dS = P * (dP - sum(dP * P)), dQ = dS K, dK = dS^T Q, dV = P^T dO. Where P is large, it is computed again in the backward
pass instead of being kept (Dao et al. 2022, arXiv 2205.14135).
Letters: H heads, H' key and value heads, T tokens, D head dimension of queries and keys, D' of values; S query slots
and K key slots of a row; C chunks of a block, n queries and m keys in each.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from atomtune.batch.blocks import Block, Places
from atomtune.model.scores import ScoreRules, weights_beside_sinks

#: The softmax weights are kept for the backward pass if they have at most this many times the numbers of the queries.
#: That adds about a third to what a layer keeps otherwise.
MOST_KEPT = 8


class BlockAttention(torch.autograd.Function):
    """q [H, T, D], k [H', T, D], v [H', T, D'], sinks [H] or None → [H, T, D'].

    biases  of each block, [C, 1, n, m - seen_by_all]: 0 where a query sees a key, else -inf
    The output at padding after the row is zero, and padding adds to no gradient.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd passes them by position
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        blocks: tuple[Block, ...],
        places: Places,
        biases: tuple[torch.Tensor, ...],
        rules: ScoreRules,
    ) -> torch.Tensor:
        heads, tokens, _ = q.shape
        scores = heads * sum(block.scores for block in blocks)
        keeps = any(ctx.needs_input_grad) and rules.softcap is None and scores <= MOST_KEPT * q.numel()
        kept: list[torch.Tensor] = []  # P of each block
        rows = _QKV(*map(_rows, (q, k, v)))
        out = v.new_empty(len(places.queries), v.shape[-1])  # [H * S, D']
        for block, bias in zip(blocks, biases, strict=True):
            view = _BlockView(block, heads)
            gathered = view.gather(rows, places, rules)
            weights, _ = view.weights(gathered, bias, rules, sinks)
            if keeps:
                kept.append(weights)
            torch.bmm(weights, gathered.v, out=view.queries(out))
        ctx.save_for_backward(q, k, v, sinks, *kept)
        ctx.blocks, ctx.places, ctx.biases, ctx.rules = blocks, places, biases, rules
        return _by_token(out, places, heads, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, *kept = ctx.saved_tensors
        places, rules = ctx.places, ctx.rules
        heads, tokens, _ = q.shape
        rows = _QKV(*map(_rows, (q, k, v)))
        grad_out_rows = _rows(grad_out)  # [T * H, D']
        grads = _QKV.empty_slots(q, k, v, places)
        grad_sinks = torch.zeros_like(sinks) if ctx.needs_input_grad[3] else None
        kept_weights = iter(kept)
        for block, bias in zip(ctx.blocks, ctx.biases, strict=True):
            view = _BlockView(block, heads)
            gathered = view.gather(rows, places, rules)
            weights, slope = next(kept_weights, None), None  # without a soft cap, where weights are kept
            if weights is None:
                weights, slope = view.weights(gathered, bias, rules, sinks)
            # A padded query repeats some token; its gradient must not be added to that token's.
            grad = view.queries(places.holds) * view.queries_of(grad_out_rows, places)  # dO [C * H, n, D']
            view.backward(gathered, grad, weights, slope, into=grads, into_sinks=grad_sinks)
        # The queries were multiplied with the scaling when they were gathered, the keys never.
        grad_q = _by_token(grads.q, places, heads, tokens).mul_(rules.scaling)
        grad_k = _summed_by_token(grads.k, places, len(k))
        grad_v = _summed_by_token(grads.v, places, len(v))
        return grad_q, grad_k, grad_v, grad_sinks, None, None, None, None


@dataclass(frozen=True, slots=True)
class _QKV:
    """Queries, keys and values, or their gradients: the rows of all tokens or slots, or those of one block."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def empty_slots(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: Places) -> "_QKV":
        """[H * S, D], [H * K, D] and [H * K, D'], to be written: the gradients of all slots."""
        return cls(
            q.new_empty(len(places.queries), q.shape[-1]),
            k.new_empty(len(places.keys), k.shape[-1]),
            v.new_empty(len(places.keys), v.shape[-1]),
        )


@dataclass(frozen=True, slots=True)
class _BlockView:
    """One block within the tensors of all slots."""

    block: Block
    heads: int

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """[H * S, D] → [C * H, n, D]"""
        return x[self._query_rows].view(-1, self.block.queries, x.shape[-1])

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """[H * K, D] → [C * H, m, D]"""
        return x[self._key_rows].view(-1, self.block.keys, x.shape[-1])

    def queries_of(self, rows: torch.Tensor, places: Places) -> torch.Tensor:
        """[T * H, D] by token → [C * H, n, D]"""
        return rows.index_select(0, places.queries[self._query_rows]).view(-1, self.block.queries, rows.shape[-1])

    def keys_of(self, rows: torch.Tensor, places: Places) -> torch.Tensor:
        """[T * H', D] by token → [C * H, m, D]; each head gets keys of its own."""
        return rows.index_select(0, places.keys[self._key_rows]).view(-1, self.block.keys, rows.shape[-1])

    @property
    def _query_rows(self) -> slice:
        first, size = self.block.first_query, self.block.count * self.block.queries
        return slice(self.heads * first, self.heads * (first + size))

    @property
    def _key_rows(self) -> slice:
        first, size = self.block.first_key, self.block.count * self.block.keys
        return slice(self.heads * first, self.heads * (first + size))

    def gather(self, rows: _QKV, places: Places, rules: ScoreRules) -> _QKV:
        """The block's scaled queries [C * H, n, D], keys [C * H, m, D] and values [C * H, m, D'].

        They are gathered just before they are used, so that they are still in the cache.
        """
        scaled = self.queries_of(rows.q, places).mul_(rules.scaling)
        return _QKV(scaled, self.keys_of(rows.k, places), self.keys_of(rows.v, places))

    def weights(
        self, gathered: _QKV, bias: torch.Tensor, rules: ScoreRules, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The softmax weights [C * H, n, m] of gathered queries and keys, and the slope of the soft cap or None.

        The softmax is computed in float32 or float64.
        """
        scores, slope = rules.capped(torch.bmm(gathered.q, gathered.k.mT))
        scores.view(self.block.count, self.heads, *scores.shape[1:])[..., self.block.seen_by_all :].add_(bias)
        if sinks is not None:
            sinks = sinks.repeat(self.block.count)[:, None, None]  # [C * H, 1, 1]
        return weights_beside_sinks(scores, sinks), slope

    def backward(
        self,
        gathered: _QKV,
        grad_out: torch.Tensor,
        weights: torch.Tensor,
        slope: torch.Tensor | None,
        *,
        into: _QKV,
        into_sinks: torch.Tensor | None,
    ) -> None:
        """Write the gradients of the block's slots into `into`, and add to that of the sinks.

        gathered  the block's queries, keys and values
        grad_out  [C * H, n, D'] gradient of each query's output
        weights   [C * H, n, m] P
        slope     of the scores' soft cap; None without a cap
        """
        torch.bmm(weights.mT, grad_out, out=self.keys(into.v))
        grad_weights = torch.bmm(grad_out, gathered.v.mT)  # dP
        if into_sinks is not None:
            sink_share = 1 - weights.sum(-1)  # [C * H, n]
            per_query = sink_share * (weights * grad_weights).sum(-1)
            into_sinks -= per_query.view(self.block.count, self.heads, -1).sum((0, 2))
        # The kernel that autograd uses has no public name. Written out, it takes three passes over the scores.
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)  # dS
        if slope is not None:
            grad_scores *= slope
        torch.bmm(grad_scores, gathered.k, out=self.queries(into.q))
        torch.bmm(grad_scores.mT, gathered.q, out=self.keys(into.k))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[H, T, D] → [T * H, D]; a view of the memory order that models use, [T, H, D]."""
    return x.transpose(0, 1).reshape(-1, x.shape[-1])


def _by_token(x: torch.Tensor, places: Places, heads: int, tokens: int) -> torch.Tensor:
    """[H * S, D] by slot → [H, T, D] by token, zero at padding. In memory the tokens come first: [T, H, D]."""
    out = x.new_empty(tokens * heads, x.shape[-1])
    torch.index_select(x, 0, places.back, out=out[: len(places.back)])
    out[len(places.back) :].zero_()
    return out.view(tokens, heads, -1).transpose(0, 1)


def _summed_by_token(x: torch.Tensor, places: Places, key_heads: int) -> torch.Tensor:
    """[H * K, D] by slot → [H', T, D] by token: the sum over all slots and heads that read a token's key or value.

    An EmbeddingBag is this sum, in one pass and with float32 for bfloat16 rows. A token in no slot gets zero.
    """
    summed = functional.embedding_bag(places.copies, x, places.copy_starts, mode="sum", include_last_offset=True)
    return summed.view(-1, key_heads, x.shape[-1]).transpose(0, 1)
