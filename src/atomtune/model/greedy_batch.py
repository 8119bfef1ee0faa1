"""Greedy batch: greedy answers to many prompts at once, equal to those of one prompt at a time.

Prompts of a batch are padded on the left, and positions count real tokens only. A model whose layers count padding too
(MiniMax's linear attention) answers the prompts one by one. If all prompts begin with the same tokens, these are
computed once, and their keys and values are copied to every row:

    shared        p p p p                 computed once, [1, P]
    row 0           · · a a a  →          padded after the shared tokens, masked
    row 1           b b b b b  →
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, GenerationConfig

from atomtune.model.agreement import TIMES_NOISE, another_plain_way, unit
from atomtune.model.base_shape import positions_of
from atomtune.model.causal_lm import CausalLM
from atomtune.model.layout_support import windows_of
from atomtune.model.loss import innermost, takes
from atomtune.model.rotary import rotary_limit
from atomtune.model.token_rows import with_row
from atomtune.shared_prefix import shared_length

#: A shorter common beginning is not worth a call of its own.
LEAST_SHARED = 16
#: Whether a model's layers count padding; found out once per model.
_KNOWN: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Generated:
    """One answer's ids without its stop token; stopped is False if it ended at a limit instead."""

    ids: tuple[int, ...]
    stopped: bool


@torch.no_grad()
def generate_answers(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    seconds: float | None = None,
) -> list[Generated]:
    """Answer every prompt greedily, until a stop token, max_new_tokens, or `seconds` for the whole batch.

    prompts  token ids of each prompt; a common beginning of all is computed once
    An answer also ends where the model has no more positions.
    """
    pad_id = with_row(model, pad_id)
    if len(prompts) > 1 and _must_ask_alone(model, prompts, pad_id=pad_id, max_new_tokens=max_new_tokens):
        one_by_one = partial(
            generate_answers,
            stop_ids=stop_ids,
            pad_id=pad_id,
            max_new_tokens=max_new_tokens,
            seconds=None if seconds is None else seconds / len(prompts),
        )
        return [answer for prompt in prompts for answer in one_by_one(model, [prompt])]
    width = max(len(prompt) for prompt in prompts)
    room = _positions(model) - width
    if room < 1:
        return [Generated((), stopped=False)]
    max_new_tokens = min(max_new_tokens, room)
    shared = _shared_by_all(prompts) if len(prompts) > 1 and _may_share(model) else 0
    inputs = _left_padded(model, prompts, shared=shared, pad_id=pad_id)
    if shared:
        inputs[_cache_name(model)] = _computed_once(model, prompts[0][:shared], rows=len(prompts))
    generated = _greedily(
        model, inputs, pad_id=pad_id, eos_token_id=list(stop_ids), max_new_tokens=max_new_tokens, max_time=seconds
    )
    return [_until_stop(row[width:].tolist(), stop_ids) for row in generated]


def _must_ask_alone(model: CausalLM, prompts: Sequence[Sequence[int]], *, pad_id: int, max_new_tokens: int) -> bool:
    """Whether some of these prompts would get other answers in a batch than alone."""
    width = max(len(prompt) for prompt in prompts)
    if width + max_new_tokens > _positions(model):  # shorter prompts may write longer answers
        return True
    limit = rotary_limit(model.config)
    if limit is not None and width + max_new_tokens > limit:  # a long prompt would change the rotary factors of all
        return True
    differ = any(len(prompt) < width for prompt in prompts)
    return differ and _counts_padding(model, pad_id)


def _positions(model: CausalLM) -> int:
    """The most tokens of a prompt and its answer that the model has positions for."""
    return positions_of(model.config) or sys.maxsize


def _left_padded(model: CausalLM, prompts: Sequence[Sequence[int]], *, shared: int, pad_id: int) -> dict[str, Any]:
    """Inputs of the model: prompts padded on the left to the longest, behind the `shared` tokens of all."""
    width = max(len(prompt) for prompt in prompts)
    rows: list[list[int]] = []
    masks: list[list[int]] = []
    for prompt in prompts:
        padding = width - len(prompt)
        rows.append([*prompt[:shared], *[pad_id] * padding, *prompt[shared:]])
        masks.append([1] * shared + [0] * padding + [1] * (len(prompt) - shared))
    return {
        "input_ids": torch.tensor(rows, device=model.device),  # [B, T]
        "attention_mask": torch.tensor(masks, device=model.device),
    }


def _greedily(model: CausalLM, inputs: dict[str, Any], *, pad_id: int, **settings: Any) -> Any:
    """What the model generates, [B, T + new] ids by default, taking the most likely token each time.

    Its own generation settings are taken away meanwhile, because transformers would fill these settings in from them.
    """
    greedy = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=pad_id, **settings)
    inner = innermost(model)
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        return model.generate(**inputs, generation_config=greedy)
    finally:
        inner.generation_config = own


def _counts_padding(model: CausalLM, pad_id: int) -> bool:
    """Whether left padding changes the predictions for a prompt by more than rounding."""
    inner = innermost(model)
    if inner not in _KNOWN:
        vocab_size = inner.config.get_text_config().vocab_size
        long, short = ([(7 * n + 5) % vocab_size for n in range(length)] for length in (24, 9))
        alone = _first_tokens(model, [short], pad_id)
        with another_plain_way(model):
            noise = (_first_tokens(model, [short], pad_id) - alone).abs().mean().item()
        difference = (_first_tokens(model, [long, short], pad_id)[1:] - alone).abs().mean().item()
        rounding = 32 * unit(inner.get_input_embeddings().weight.dtype)
        _KNOWN[inner] = not difference <= max(TIMES_NOISE * noise, rounding)  # True for NaN
    return _KNOWN[inner]


def _first_tokens(model: CausalLM, prompts: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """[B, 3, V] log-probabilities of an answer's first three tokens, so that two of them continue from a cache."""
    inputs = _left_padded(model, prompts, shared=0, pad_id=pad_id)
    generated = _greedily(
        model, inputs, pad_id=pad_id, max_new_tokens=3, output_logits=True, return_dict_in_generate=True
    )
    # Clamped, because some models mask tokens with -inf.
    return torch.stack(generated.logits, 1).double().log_softmax(-1).clamp(min=-1e4)


def _may_share(model: CausalLM) -> bool:
    """Whether a beginning may be shared: padding after it shifts sliding windows, which count slots, not positions."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    return not any(windows_of(model)) and kinds <= {"full_attention"}


def _shared_by_all(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share, 0 if too few. Each prompt keeps one token to predict its answer from."""
    # In sorted order: what first and last share, all share
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    most = min(len(prompt) for prompt in prompts) - 1
    length = min(shared_length(first, last), most)
    return length if length >= LEAST_SHARED else 0


def _cache_name(model: CausalLM) -> str:
    """The name of forward's argument for the cache: transformers renamed it in 5.24 and drops the old name in 5.40."""
    return "cache" if takes(model, "cache") else "past_key_values"


def _computed_once(model: CausalLM, ids: Sequence[int], *, rows: int) -> DynamicCache:
    """The cache of a shared beginning, repeated for each row."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=True, **{_cache_name(model): cache})
    cache.batch_repeat_interleave(rows)
    return cache


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> Generated:
    for i, token in enumerate(ids):
        if token in stop_ids:
            return Generated(tuple(ids[:i]), stopped=True)
    return Generated(tuple(ids), stopped=False)
