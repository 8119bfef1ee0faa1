"""Scores: the step from products of queries and keys to attention weights, apart from the mask.

Scaled dot products (Vaswani et al. 2017); soft caps as in Gemma 2, cap * tanh(score / cap); sinks as in GPT-OSS: one
more score per head, which takes part in each softmax but has no value.
Letters: Q queries, K keys, H heads.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class ScoreRules:
    """How a layer computes scores: q k * scaling, then the soft cap, unless `softcap` is None."""

    scaling: float
    softcap: float | None = None

    def capped(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scaled scores [..., Q, K] → (capped scores, d capped / d scores); without a cap, (scores, None)."""
        if self.softcap is None:
            return scores, None
        tanh = torch.tanh(scores / self.softcap)
        return tanh * self.softcap, 1 - tanh * tanh


def names_a_cap(config: Any) -> bool:
    """Whether a model's config sets a soft cap for attention scores.

    transformers' sdpa has no soft cap: newer versions refuse it for such a model, but 5.17 silently leaves the cap out.
    """
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def weights_beside_sinks(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Masked scores [..., Q, K] → their softmax over the keys and, if there is one, the head's sink.

    sinks  broadcast over [..., 1, 1]; with them the weights of a query sum to less than one
    """
    if sinks is None:
        return scores.softmax(-1)
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
    total = torch.logaddexp(exact.logsumexp(-1, keepdim=True), sinks.to(exact.dtype))  # [..., Q, 1]
    return (exact - total).exp().to(scores.dtype)
