"""Scores: what stands between q k and the weights of an attention, beside the mask.

Scaled dot products (Vaswani et al. 2017); soft-capped scores as in Gemma 2, cap * tanh(score / cap); sinks as in
GPT-OSS, a score per head that takes its share of each softmax and gives no value.
Letters: Q queries, K keys, H heads.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class ScoreRules:
    """How a layer makes scores: q k * scaling, then soft-capped where `softcap` is a number."""

    scaling: float
    softcap: float | None = None

    def capped(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scaled scores [..., Q, K] → (capped scores, d capped / d scores); without a cap as they are, and None."""
        if self.softcap is None:
            return scores, None
        tanh = torch.tanh(scores / self.softcap)
        return tanh * self.softcap, 1 - tanh * tanh


def names_a_cap(config: Any) -> bool:
    """Whether a model's config caps its attention's scores.

    transformers' sdpa cannot: newer versions refuse it for such a model, 5.17 takes it and leaves the cap out, unsaid.
    """
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def weights_beside_sinks(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Masked scores [..., Q, K] → softmax over the keys and, where there is one, the sink of the head.

    sinks  broadcast over [..., 1, 1]; their share is what is missing to a sum of one
    """
    if sinks is None:
        return scores.softmax(-1)
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
    total = torch.logaddexp(exact.logsumexp(-1, keepdim=True), sinks.to(exact.dtype))  # [..., Q, 1]
    return (exact - total).exp().to(scores.dtype)
