"""Layout support: whether this model computes rows with branches exactly, asked of the model itself.

Nothing is taken from a list of architectures: a small tree is computed and compared with its records one at a time
(layout_trial.py), in each way that the model may take, until one is exact.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from atomtune.batch.attention_plan import Cut
from atomtune.batch.collate import Collator
from atomtune.choices import Layout
from atomtune.data.records import Example
from atomtune.errors import BadModel
from atomtune.model import layout_trial, row_mixers
from atomtune.model.attention_in_use import AttentionInUse
from atomtune.model.causal_lm import CausalLM
from atomtune.model.loss import auxiliary_factor, body_of, innermost, takes
from atomtune.model.mixers import find_mixers, takes_cache
from atomtune.model.row_attention import ROWS, register
from atomtune.model.token_rows import with_row

#: Kinds of attention that a plan expresses, or that carry a state. Others (chunked, sparse) are refused by name:
#: a trial may lie in one chunk, or read all keys where a longer record reads a choice of them.
_KNOWN_ATTENTION = {"full_attention", "sliding_attention", "linear_attention", "attention"}


def cut_of(model: nn.Module) -> Cut:
    """How rows are cut for this model's device."""
    embeddings: Any = innermost(model).get_input_embeddings()
    return "spans" if embeddings.weight.device.type == "cuda" else "blocks"


def windows_of(model: nn.Module) -> tuple[int | None, ...]:
    """The sliding windows that layers of this model may have; None is a layer that sees everything before."""
    config = innermost(model).config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return (None, window) if window else (None,)


def carries_state(model: nn.Module) -> bool:
    """Whether rows of this model need to say where a state forks; known after `why_padded`."""
    return row_mixers.carries_state(body_of(model))


def collator_for(
    model: CausalLM, layout: Layout, *, pad_id: int, as_examples: Callable[[Mapping[str, Any]], Sequence[Example]]
) -> Collator:
    """What lays batches out for a model; its rows in the way that `why_padded` has set it to.

    Raises BadModel where not even padded rows can be computed, or give what their records give alone.
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
        carries_state=carries_state(model),
    )


@dataclass(frozen=True)
class _Way:
    """One way in which a model may compute rows."""

    attention: str | None  # the name of the attention function; None: it uses none of the library's
    mixers: row_mixers.Way | None  # how layers that carry a state do it; None: there are none


def why_padded_by_config(model: CausalLM) -> str | None:
    """The reason that a config gives, without a trial; a model without weights may be asked too."""
    config = innermost(model).config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    foreign = {kind for kind in kinds - _KNOWN_ATTENTION if "attention" in kind or "sparse" in kind}
    if foreign:
        return f"it has layers of the kind {', '.join(sorted(foreign))}"
    if auxiliary_factor(model):
        # It is a product of means over the tokens of a batch, which a shared beginning would enter once.
        return "its config switches on the routers' auxiliary loss (output_router_logits), which counts every token"
    return None


def why_padded(model: CausalLM, *, sharded: bool = False) -> str | None:
    """The reason this model takes one example a row only, or None where rows of many are exact.

    sharded  the run spreads the weights over processes (FSDP, DeepSpeed)
    Leaves the model in the first way that is exact, or as it was.
    """
    if reason := why_padded_by_config(model):
        return reason
    inner = innermost(model)
    config = inner.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # the loss would be multiplied by 0, and its shapes fit no row of many
    register()
    mixers, used_windows = find_mixers(inner)
    if mixers and sharded:
        # Such a layer is called once for each level of branches. Where weights are gathered around each call, processes
        # whose batches have other numbers of levels would wait for each other. Not tried on several GPUs yet.
        return "its layers carry a state from token to token, which FSDP and DeepSpeed allow in padded rows only"
    if not takes(model, "position_ids") and not any(map(takes_cache, mixers)):
        return "its forward takes no position_ids"
    reasons = []
    # A config may name a window in words of its own.
    has_window = any(windows_of(model)) or any(used_windows)
    for way in _ways(mixers, bool(used_windows), has_window):
        before = AttentionInUse.of(inner)
        if not _take(inner, way, mixers):
            _take_back(inner, before, mixers)
            continue
        reason = layout_trial.difference(
            model, windows=windows_of(model), cut=cut_of(model), carries_state=way.mixers is not None
        )
        if reason is None:
            return None
        reasons.append(reason)
        _take_back(inner, before, mixers)
    return reasons[0] if reasons else "its attention cannot be replaced"


def _ways(mixers: list[nn.Module], attends: bool, has_window: bool) -> Iterator[_Way]:
    """The ways to try, the best one first.

    A window that a model's own code draws in its mask would be lost in every other way, which no shorter trial sees.
    """
    attention: list[str | None] = [ROWS, "sdpa"]
    if has_window:
        attention = [ROWS] if attends else []
    elif mixers and not attends:
        attention = [None]
    for name in attention:
        if mixers:
            if all(map(takes_cache, mixers)):
                yield _Way(name, "fork")
            yield _Way(name, "paths")
        else:
            yield _Way(name, None)


def _take(inner: Any, way: _Way, mixers: list[nn.Module]) -> bool:
    """Set the model to a way; False where its attention cannot be exchanged."""
    if way.attention is not None:
        try:
            inner.set_attn_implementation(way.attention)
        except (ValueError, AttributeError, ImportError, KeyError):
            return False
        if inner.config._attn_implementation != way.attention:  # transformers warns and leaves some as they are
            return False
    if way.mixers is not None:
        row_mixers.install(body_of(inner), mixers, way.mixers)
    return True


def _take_back(inner: Any, attention: AttentionInUse, mixers: list[nn.Module]) -> None:
    row_mixers.uninstall(body_of(inner), mixers)
    attention.give_back()
