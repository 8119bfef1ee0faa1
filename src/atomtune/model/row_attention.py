"""Row attention: the function that transformers' models call instead of their own attention.

batch.attention_plan makes the plan. It is passed through the model's forward as the keyword ROW_PLAN.
Letters: H heads, H' key and value heads, T tokens, D head dimension of queries and keys, D' of values.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from atomtune.batch.attention_plan import AttentionPlan
from atomtune.model.block_attention import BlockAttention
from atomtune.model.scores import ScoreRules, weights_beside_sinks
from atomtune.model.span_attention import SpanAttention, flash_takes

#: The name of this function for transformers, and the keyword that passes the plan to it.
ROWS = "atomtune_rows"
ROW_PLAN = "atomtune_plan"
#: The longest row that gets a dense mask if the flash kernel does not support it: 256 MiB in float32.
MOST_MASKED = 8_192
#: Keywords of attention that no plan can express.
_NOT_IN_A_PLAN = {
    "position_bias": "a position bias",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}

#: How one layer's attention is computed.
AttentionMethod = Literal["blocks", "spans", "mask"]


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
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one row, following its plan; without a plan, with the mask that the library made.

    query [1, H, T, D], key [1, H', T, D], value [1, H', T, D'], where H is a multiple of H'
    Returns ([1, T, H, D'], None). Raises NotImplementedError if the layer needs something that no plan can express.
    """
    plan: AttentionPlan | None = kwargs.pop(ROW_PLAN, None)
    sinks: torch.Tensor | None = kwargs.pop("s_aux", None)
    sinks = kwargs.pop("sinks", None) if sinks is None else sinks
    rules = ScoreRules(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    if plan is None:
        if softcap is None and sinks is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        bias = kwargs.get("position_bias")
        return _written_out(query, key, value, attention_mask, sinks, rules, dropout, position_bias=bias), None
    _refuse_what_no_plan_expresses(module, plan, sliding_window, kwargs)
    if sinks is not None and sinks.dim() > 1:
        raise NotImplementedError("sinks of each token")
    query, key, value = _autocast(query, key, value)
    method = method_of(plan, query, value, sliding_window, rules, sinks=sinks is not None, dropout=dropout > 0)
    if method == "mask":
        return _by_mask(query, key, value, plan.dense_bias(sliding_window, query.dtype), sinks, rules, dropout), None
    if method == "spans":
        spans = plan.spans[sliding_window]
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
        out = SpanAttention.apply(q, k, v, sinks, spans, sliding_window, rules)  # [T, H, D']
    else:
        blocks, places = plan.blocks[sliding_window].each, plan.places(sliding_window, query.shape[1], key.shape[1])
        biases = plan.block_biases(sliding_window, query.dtype)
        out = BlockAttention.apply(query[0], key[0], value[0], sinks, blocks, places, biases, rules)  # [H, T, D']
        out = out.transpose(0, 1)
    return out[None], None


def _autocast(*inputs: torch.Tensor) -> Sequence[torch.Tensor]:
    """The inputs in autocast's dtype, as for the library's attention: RoPE makes float32 of queries and keys there."""
    device = inputs[0].device.type
    if not torch.is_autocast_enabled(device) or inputs[0].dtype == torch.float64:
        return inputs
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in inputs]


def _refuse_what_no_plan_expresses(
    layer: torch.nn.Module, plan: AttentionPlan, window: int | None, keywords: Mapping[str, Any]
) -> None:
    for name, meaning in _NOT_IN_A_PLAN.items():
        if keywords.get(name) is not None:
            raise NotImplementedError(meaning)
    if window not in plan.windows:
        raise NotImplementedError(f"a window of {window} tokens that the config does not name")
    # Qwen2-MoE applies its window only through the mask, but rows have no mask.
    if window is None and (own := own_window(layer)):
        raise NotImplementedError(f"a window of {own} tokens that the layer does not pass on")


def own_window(layer: torch.nn.Module) -> int | None:
    """An attention layer's own sliding window. Some models set the number also in layers without a window."""
    window: int | None = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", True) else None
    return window


def method_of(
    plan: AttentionPlan,
    query: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    rules: ScoreRules,
    *,
    sinks: bool,
    dropout: bool,
) -> AttentionMethod:
    """How a layer's attention is computed: blocks on a CPU; on a GPU the flash kernel, or one call with a mask."""
    if dropout:
        return "mask"  # only this way supports attention dropout
    if plan.blocks:
        return "blocks"
    if sinks or rules.softcap is not None:
        return "spans"  # the fused kernels for a mask support neither
    return "spans" if flash_takes(query, value, rules) or query.shape[-2] > MOST_MASKED else "mask"


def _by_mask(  # noqa: PLR0917
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    sinks: torch.Tensor | None,
    rules: ScoreRules,
    dropout: float,
) -> torch.Tensor:
    """[1, H, T, D] and twice [1, H', T, D] → [1, T, H, D'], with a dense bias [1, 1, T, T].

    In one call of torch's, or written out for soft caps and sinks.
    """
    if rules.softcap is not None or sinks is not None:
        return _written_out(query, key, value, bias, sinks, rules, dropout)
    key, value = _repeated(key, query), _repeated(value, query)  # [1, H, T, D]
    # Without cuDNN, which needs 50 to 200 ms to plan each new length of a row.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, scale=rules.scaling
        )
    return out.transpose(1, 2).contiguous()


def register() -> None:
    """Register the function with transformers; may be repeated."""
    AttentionInterface.register(ROWS, attend)
    AttentionMaskInterface.register(ROWS, sdpa_mask)  # for batches without a plan: generation, padded rows


def _repeated(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[1, H', T, D] → [1, H, T, D]: query head h uses key head h // (H / H')."""
    groups = query.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _written_out(  # noqa: PLR0917
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    rules: ScoreRules,
    dropout: float,
    *,
    position_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention in plain torch, for scores with a soft cap or sinks if no plan applies (chat, padded rows).

    query          [B, H, Q, D], key and value [B, H', K, D]
    mask           [B, 1, Q, K] bool or additive; None: causal, and the last query sees all K keys
    sinks          [H], or [B, H, Q, 1] if each token has its own
    position_bias  [B, H, Q, K], added to the scores
    Returns [B, Q, H, D']
    """
    scores, _ = rules.capped(query @ _repeated(key, query).mT * rules.scaling)  # [B, H, Q, K]
    scores = scores if position_bias is None else scores + position_bias
    if mask is None:
        queries, keys = scores.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    # Not -inf: for a padded query that sees no key, the softmax would be 0 / 0.
    hidden = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    sinks = sinks[:, None, None] if sinks is not None and sinks.dim() == 1 else sinks
    weights = weights_beside_sinks(scores, sinks)
    weights = functional.dropout(weights, dropout)
    return (weights @ _repeated(value, query)).transpose(1, 2).contiguous()
