"""Layout support: whether this model computes rows with branches exactly, tested on the model itself.

There is no list of architectures. A small tree is computed in each way that the model may use, and compared with its
records computed one at a time (layout_trial.py), until one way is exact.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from atomtune.batch.attention_plan import Cut
from atomtune.batch.collate import Collator
from atomtune.batch.segment_plan import MixerMethod
from atomtune.choices import Layout
from atomtune.data.records import Example
from atomtune.errors import BadModel
from atomtune.model import layout_trial, row_mixers
from atomtune.model.attention_in_use import AttentionInUse
from atomtune.model.causal_lm import CausalLM
from atomtune.model.loss import auxiliary_factor, body_of, innermost, takes
from atomtune.model.mixers import cache_name, find_mixers
from atomtune.model.row_attention import ROWS, register
from atomtune.model.token_rows import with_row

#: Kinds of attention that a plan can express, or that carry a state. Others (chunked, sparse) are refused by name,
#: because the trial may not notice them: it may lie in one chunk, or be so short that sparse attention reads all keys.
_KNOWN_ATTENTION = {"full_attention", "sliding_attention", "linear_attention", "attention"}


def cut_of(model: nn.Module) -> Cut:
    """How rows are cut on this model's device: spans on CUDA, else blocks."""
    return "spans" if innermost(model).get_input_embeddings().weight.device.type == "cuda" else "blocks"


def windows_of(model: nn.Module) -> tuple[int | None, ...]:
    """The sliding windows that this model's layers may have; None is a layer that sees all earlier tokens."""
    config = innermost(model).config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return (None, window) if window else (None,)


def mixer_method_of(model: nn.Module) -> MixerMethod | None:
    """How this model's mixers compute rows; None if it has none. Call it after `why_padded`, which decides that."""
    return row_mixers.method_in_use(body_of(model))


def collator_for(
    model: CausalLM, layout: Layout, *, pad_id: int, as_examples: Callable[[Mapping[str, Any]], Sequence[Example]]
) -> Collator:
    """The collator for a model's batches; rows are laid out in the way that `why_padded` has chosen.

    Raises BadModel if padded rows cannot be computed, or if they differ from their records computed alone.
    """
    pad_id = with_row(model, pad_id)
    if layout == "padded" and (reason := layout_trial.padding_difference(model, pad_id=pad_id)):
        raise BadModel(
            f"This model's results depend on padding: {reason}.\nTraining would not be on your records alone. Pass "
            "--model_path with another model."
        )
    return Collator(
        layout=layout,
        pad_id=pad_id,
        as_examples=as_examples,
        windows=windows_of(model) if layout != "padded" else (None,),
        cut=cut_of(model),
        mixers=mixer_method_of(model),
    )


@dataclass(frozen=True)
class _Candidate:
    """One way in which a model may compute rows: how its attention and its mixers do it."""

    attention: str | None  # name of the attention function; None: the model uses none of the library's
    mixers: MixerMethod | None  # how layers that carry a state do it; None: there are none


def why_padded_by_config(model: CausalLM) -> str | None:
    """Why the config requires padded rows, or None. No trial is run, so the model needs no weights."""
    config = innermost(model).config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    foreign = {kind for kind in kinds - _KNOWN_ATTENTION if "attention" in kind or "sparse" in kind}
    if foreign:
        return f"it has layers of the kind {', '.join(sorted(foreign))}"
    if auxiliary_factor(model):
        # That loss is a product of means over the tokens of a batch, where a shared beginning would count only once.
        return "its config switches on the routers' auxiliary loss (output_router_logits), which counts every token"
    return None


def why_padded(model: CausalLM, *, sharded: bool = False) -> str | None:
    """Why this model needs padded rows with one example each, or None if rows of several examples are exact.

    sharded  whether the run shards the weights over processes (FSDP, DeepSpeed)
    The model is left in the first way that is exact; if none is, as it was.
    """
    if reason := why_padded_by_config(model):
        return reason
    inner = innermost(model)
    config = inner.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # the auxiliary loss has the factor 0, and its shapes fit no row of many
    register()
    mixers, used_windows = find_mixers(inner)
    if mixers and sharded:
        # Such a layer is called once per level of branches. With sharded weights, processes whose batches have
        # different numbers of levels would wait for each other forever. Not tried on several GPUs yet.
        return "its layers carry a state from token to token, which FSDP and DeepSpeed allow in padded rows only"
    if not takes(model, "position_ids") and not any(map(cache_name, mixers)):
        return "its forward takes no position_ids"
    windows, cut = windows_of(model), cut_of(model)
    reasons = []
    # Some configs name the window by another key, so windows used in the probe count too.
    has_window = any(windows) or any(used_windows)
    for candidate in _candidates(mixers, bool(used_windows), has_window):
        before = AttentionInUse.of(inner)
        if _switch_to(inner, candidate, mixers):
            reason = layout_trial.difference(model, windows=windows, cut=cut, mixers=candidate.mixers)
            if reason is None:
                return None
            reasons.append(reason)
        _switch_back(inner, before, mixers)
    return reasons[0] if reasons else "its attention cannot be replaced"


def _candidates(mixers: list[nn.Module], attends: bool, has_window: bool) -> Iterator[_Candidate]:
    """The ways to try, the best one first.

    A model with a window gets no way other than rows: a window that its own code puts into the mask would be lost in
    any other, and the trial is too short to notice that.
    """
    attention: list[str | None] = [ROWS, "sdpa"]
    if has_window:
        attention = [ROWS] if attends else []
    elif mixers and not attends:
        attention = [None]
    for name in attention:
        if mixers:
            if all(map(cache_name, mixers)):
                yield _Candidate(name, "fork")
            yield _Candidate(name, "paths")
        else:
            yield _Candidate(name, None)


def _switch_to(inner: Any, candidate: _Candidate, mixers: list[nn.Module]) -> bool:
    """Let the model compute rows in this way; False if its attention cannot be replaced."""
    if candidate.attention is not None:
        try:
            inner.set_attn_implementation(candidate.attention)
        except (ValueError, AttributeError, ImportError, KeyError):
            return False
        # Transformers only warns, and leaves some models unchanged
        if inner.config._attn_implementation != candidate.attention:
            return False
    if candidate.mixers is not None:
        row_mixers.install(body_of(inner), mixers, candidate.mixers)
    return True


def _switch_back(inner: Any, attention: AttentionInUse, mixers: list[nn.Module]) -> None:
    """Restore what `_switch_to` has changed."""
    row_mixers.uninstall(body_of(inner), mixers)
    attention.give_back()
