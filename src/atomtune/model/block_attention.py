"""Attention by blocks, for a CPU: a few dense products instead of a T x T mask.

batch.attention_plan chooses the blocks. Forward: P = softmax(S), O = P V. Backward: dP = dO V^T,
dS = P * (dP - sum(dP * P)), dQ = dS K, dK = dS^T Q, dV = P^T dO. For long paths P is computed again in the backward
pass instead of being kept (Dao et al. 2022, arXiv 2205.14135).
Letters: H heads, T tokens, D head dimension of queries and keys, D' of values; S slots, G segments of a block, n slots
of its longest segment, A tokens of their path.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from atomtune.batch.blocks import Block, Places, Siblings
from atomtune.batch.paths import Where
from atomtune.model.scores import ScoreRules, weights_beside_sinks

#: The softmax weights are kept for the backward pass if they have at most this many times the numbers of the queries.
#: That adds about a quarter to what a layer keeps otherwise.
MOST_KEPT = 6


@dataclass(frozen=True, slots=True)
class _QKV:
    """Queries, keys and values by slot, or their gradients: [H * S, D] each, one block after another."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def empty_like(self) -> "_QKV":
        return _QKV(torch.empty_like(self.q), torch.empty_like(self.k), torch.empty_like(self.v))


@dataclass(frozen=True, slots=True)
class _Path:
    """Keys and values of the path above some siblings, each [H, A, D]; or its gradients, each [H, D, A]."""

    k: torch.Tensor
    v: torch.Tensor


class BlockAttention(torch.autograd.Function):
    """q, k [H, T, D], v [H, T, D'], sinks [H] or None → [H, T, D'].

    Keys and values are already repeated, so that each head has its own. The output at padding after the row is zero,
    and padding adds to no gradient.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd passes them by position
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        all_siblings: tuple[Siblings, ...],
        places: Places,
        rules: ScoreRules,
    ) -> torch.Tensor:
        scores = len(q) * sum(block.scores for siblings in all_siblings for block in siblings.blocks)
        keeps = any(ctx.needs_input_grad) and rules.softcap is None and scores <= MOST_KEPT * q.numel()
        kept: list[torch.Tensor] = []  # P of each block
        inputs = (q, k, v, sinks)
        by_slot = _laid_out(q, k, v, places, rules)
        k, v = k.contiguous(), v.contiguous()
        out = torch.empty_like(by_slot.v)  # [H * S, D']
        for siblings in all_siblings:
            path = _Path(_take(k, siblings.path), _take(v, siblings.path))
            for block in siblings.blocks:
                view = _BlockView(block, siblings.path_tokens, len(q))
                weights, _ = view.weights(by_slot, path, rules, sinks)
                if keeps:
                    kept.append(weights)
                torch.bmm(view.on_segment(weights), view.segments(by_slot.v), out=view.segments(out))
                if block.path_keys:
                    view.slots(out).baddbmm_(view.on_path(weights), path.v[:, : block.path_keys])
        ctx.save_for_backward(*inputs, *kept)
        ctx.all_siblings, ctx.places, ctx.rules = all_siblings, places, rules
        return _by_token(out, places, v.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, *kept = ctx.saved_tensors
        places, rules = ctx.places, ctx.rules
        by_slot = _laid_out(q, k, v, places, rules)
        # A padding slot repeats some token; its gradient must not be added to that token's.
        grad_slots = _lay(grad_out, places).mul_(places.holds)  # [H * S, D']
        grad_sinks = torch.zeros_like(sinks) if ctx.needs_input_grad[3] else None
        own = by_slot.empty_like()  # gradients within the segments
        weights_of_blocks = iter(kept)
        above: list[tuple[Where | None, _Path]] = []  # gradients of the paths, from all branches below
        k, v = k.contiguous(), v.contiguous()
        for siblings in ctx.all_siblings:
            path = _Path(_take(k, siblings.path), _take(v, siblings.path))
            into_path = _Path(torch.zeros_like(path.k.mT), torch.zeros_like(path.v.mT))
            above.append((siblings.path, into_path))
            for block in siblings.blocks:
                view = _BlockView(block, siblings.path_tokens, len(q))
                weights = next(weights_of_blocks, None)
                weights_and_slope = view.weights(by_slot, path, rules, sinks) if weights is None else (weights, None)
                view.backward(
                    by_slot, path, grad_slots, *weights_and_slope, into=own, into_path=into_path, into_sinks=grad_sinks
                )
        grad_q, grad_k, grad_v = (_by_token(own.q, places, q.shape), _by_token(own.k, places, k.shape),
                                  _by_token(own.v, places, v.shape))  # fmt: skip
        for where, into_path in above:
            _add(grad_k, where, into_path.k.mT)
            _add(grad_v, where, into_path.v.mT)
        return grad_q.mul_(rules.scaling), grad_k, grad_v, grad_sinks, None, None, None


@dataclass(frozen=True, slots=True)
class _BlockView:
    """One block within the tensors of all slots.

    Its scores and weights are [H * G, n, A + n]:

               |  path  | the segment |
        slot 0 | . . .  |   .         |     on_path(x)     [H, G * n, A]   one product for all segments: same keys
        slot 1 | . . .  |   . .       |     on_segment(x)  [H * G, n, n]   one product per segment
    """

    block: Block
    path_tokens: int  # keys of the path; the padding after them, up to block.path_keys, is masked
    heads: int

    def slots(self, x: torch.Tensor) -> torch.Tensor:
        """[H * S, D] → [H, G * n, D]"""
        first, size = self.block.first, self.block.count * self.block.width
        return x[self.heads * first : self.heads * (first + size)].view(self.heads, size, -1)

    def segments(self, x: torch.Tensor) -> torch.Tensor:
        """[H * S, D] → [H * G, n, D]"""
        return self.slots(x).view(self.heads * self.block.count, self.block.width, -1)

    def on_segment(self, scores: torch.Tensor) -> torch.Tensor:
        """[H * G, n, A + n] → [H * G, n, n]"""
        return scores[..., self.block.path_keys :]

    def on_path(self, scores: torch.Tensor) -> torch.Tensor:
        """[H * G, n, A + n] → [H, G * n, A]"""
        return scores.view(self.heads, -1, scores.shape[-1])[..., : self.block.path_keys]

    def products(self, a: torch.Tensor, b: torch.Tensor, path_b: torch.Tensor) -> torch.Tensor:
        """Dot products of each slot in a with the path and with the slots of its own segment in b.

        a, b [H * S, D], path_b [H, A, D]
        Returns [H * G, n, A + n]
        """
        segments_a, path_keys = self.segments(a), self.block.path_keys
        out = a.new_empty(len(segments_a), self.block.width, path_keys + self.block.width)
        torch.bmm(segments_a, self.segments(b).mT, out=self.on_segment(out))
        if path_keys:
            torch.bmm(self.slots(a), path_b[:, :path_keys].mT, out=self.on_path(out))
        return out

    def weights(
        self, by_slot: _QKV, path: _Path, rules: ScoreRules, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The softmax weights [H * G, n, A + n] of scaled queries, and the slope of the soft cap or None.

        The softmax is computed in float32 or float64.
        """
        scores, slope = rules.capped(self.products(by_slot.q, by_slot.k, path.k))
        mask = self.block.mask.to(scores.dtype)
        if self.block.path_keys > self.path_tokens:
            scores[..., self.path_tokens : self.block.path_keys] = -torch.inf
        if mask.shape[-1] > self.block.width:  # a sliding window hides part of the path
            scores[..., : self.path_tokens].add_(mask[:, : self.path_tokens])
        self.on_segment(scores).add_(mask[:, -self.block.width :])
        if sinks is not None:
            sinks = sinks.repeat_interleave(self.block.count)[:, None, None]  # [H * G, 1, 1]
        return weights_beside_sinks(scores, sinks), slope

    def backward(
        self,
        by_slot: _QKV,
        path: _Path,
        grad_slots: torch.Tensor,
        weights: torch.Tensor,
        slope: torch.Tensor | None,
        *,
        into: _QKV,
        into_path: _Path,
        into_sinks: torch.Tensor | None,
    ) -> None:
        """Write the gradients of the block's own slots, and add to those of its path and of the sinks.

        grad_slots  [H * S, D'] gradient of each slot's output
        weights     [H * G, n, A + n] P
        slope       of the scores' soft cap; None without a cap
        """
        grad_weights = self.products(grad_slots, by_slot.v, path.v)  # dP
        if into_sinks is not None:
            sink_share = 1 - weights.sum(-1)  # [H * G, n]
            per_slot = sink_share * (weights * grad_weights).sum(-1)
            into_sinks -= per_slot.view(self.heads, -1).sum(-1)
        # The kernel that autograd uses has no public name. Written out, it takes three passes over the scores.
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)  # dS
        if slope is not None:
            grad_scores *= slope
        torch.bmm(self.on_segment(grad_scores), self.segments(by_slot.k), out=self.segments(into.q))
        torch.bmm(self.on_segment(grad_scores).mT, self.segments(by_slot.q), out=self.segments(into.k))
        torch.bmm(self.on_segment(weights).mT, self.segments(grad_slots), out=self.segments(into.v))
        keys = self.block.path_keys
        if keys:
            self.slots(into.q).baddbmm_(self.on_path(grad_scores), path.k[:, :keys])
            into_path.k[..., :keys].add_(self.slots(by_slot.q).mT @ self.on_path(grad_scores))
            into_path.v[..., :keys].add_(self.slots(grad_slots).mT @ self.on_path(weights))


def _laid_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: Places, rules: ScoreRules) -> _QKV:
    """q, k, v, each [H, T, D] → by slot, with scaled queries."""
    return _QKV(_lay(q * rules.scaling, places), _lay(k, places), _lay(v, places))


def _lay(x: torch.Tensor, places: Places) -> torch.Tensor:
    """[H, T, D] by token → [H * S, D] by slot."""
    return x.transpose(0, 1).reshape(-1, x.shape[-1]).index_select(0, places.gather)


def _by_token(x: torch.Tensor, places: Places, shape: torch.Size) -> torch.Tensor:
    """[H * S, D] by slot → [H, T, D] by token, zero at padding. In memory the tokens come first: [T, H, D]."""
    heads, tokens, width = shape
    out = x.new_empty(tokens * heads, width)
    torch.index_select(x, 0, places.back, out=out[: len(places.back)])
    out[len(places.back) :].zero_()
    return out.view(tokens, heads, width).transpose(0, 1)


def _take(x: torch.Tensor, path: Where | None) -> torch.Tensor:
    """[H, T, D] → [H, A, D], the path's tokens. Without a path, A is 0."""
    if path is None:
        return x[:, :0]
    return x.index_select(1, path) if isinstance(path, torch.Tensor) else x[:, path]


def _add(x: torch.Tensor, path: Where | None, part: torch.Tensor) -> None:
    """Add part [H, A, D] to the path's tokens in x [H, T, D]."""
    if isinstance(path, torch.Tensor):
        x.index_add_(1, path, part)
    elif path is not None:
        x[:, path].add_(part)
