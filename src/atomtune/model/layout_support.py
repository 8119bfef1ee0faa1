"""Layout support: whether this model computes rows with branches exactly, asked of the model itself.

Before: load.py, adapter.py.  After: train.model chooses a layout.
Nothing is taken from a list of architectures: a small tree is computed and compared with its records one at a time.
"""

from typing import Any

import torch
from torch import nn

from atomtune.batch.attention_plan import Cut
from atomtune.batch.collate import collate_row
from atomtune.batch.row import Row, untils
from atomtune.batch.tree import graft
from atomtune.data.records import Example
from atomtune.model.loss import innermost, model_inputs, takes
from atomtune.model.row_attention import ROWS, register

#: Layers whose attention the plan can express: everything before, or the last tokens before.
_EXPRESSIBLE = {"full_attention", "sliding_attention"}
#: A tree must come this much nearer to its records alone than the same tree with its branches cut from their trunk.
_NEARER = 0.2


def cut_of(model: nn.Module) -> Cut:
    """How rows are cut for this model's device."""
    return "spans" if _device(model).type == "cuda" else "blocks"


def windows_of(model: nn.Module) -> tuple[int | None, ...]:
    """The sliding windows that layers of this model may have; None is a layer that sees everything before."""
    config = innermost(model).config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return (None, window) if window else (None,)


def why_padded(model: nn.Module) -> str | None:
    """The reason this model takes one example a row only, or None where rows of many are exact.

    Gives the model the attention function for rows where it accepts one.
    """
    inner = innermost(model)
    config = inner.config.get_text_config() if hasattr(inner.config, "get_text_config") else inner.config
    if not takes(model, "position_ids"):
        return "its forward takes no position_ids"
    kinds = set(getattr(config, "layer_types", None) or ()) - _EXPRESSIBLE
    if kinds:
        return f"it has layers of the kind {', '.join(sorted(kinds))}"
    experts = [(name, n) for name, n in vars(config).items() if "experts" in name and isinstance(n, int) and n > 1]
    if experts:
        return f"it routes tokens to experts ({experts[0][0]} = {experts[0][1]})"
    register()
    before = inner.config._attn_implementation
    trunk, examples = _probe(config.vocab_size)
    alone = torch.cat([_logits(model, _plain(model, example))[trunk:] for example in examples])
    reasons = []
    for implementation in (ROWS, "sdpa"):
        try:
            inner.set_attn_implementation(implementation)
        except (ValueError, AttributeError, ImportError, KeyError):
            continue
        if implementation != ROWS and any(windows_of(model)[1:]):
            continue  # a ready mask would replace the window's, without a word
        reason = _difference(model, trunk, examples, alone)
        if reason is None:
            return None
        reasons.append(reason)
    inner.set_attn_implementation(before)
    return reasons[0] if reasons else "its attention cannot be exchanged"


def _probe(words: int) -> tuple[int, list[Example]]:
    """The length of a trunk, and two examples that share it; the shorter one stands first."""
    words = min(words, 1_000)
    trunk = [(7 * i + 3) % words for i in range(24)]
    return len(trunk), [
        Example(tuple(trunk + [(11 * i + k) % words for i in range(9 + k)]), (0,) * 20 + (1,) * (13 + k), f"probe {k}")
        for k in (1, 2)
    ]


def _difference(model: nn.Module, trunk: int, examples: list[Example], alone: torch.Tensor) -> str | None:
    """Compute the examples as a tree; in what it differs from the examples alone [T, V] behind the trunk, or None."""
    tree = graft(examples, least_saved=1)
    assert tree.ids[: len(examples[0].ids)] == examples[0].ids, "the shorter leaf stands first"
    cut = tuple(-1 if parent >= 0 and parent != i - 1 else parent for i, parent in enumerate(tree.parent))
    blind = Row(tree.ids, cut, untils(cut), tree.learn, tree.origins)
    try:
        together = _logits(model, _as_row(model, tree))[trunk : len(tree)]
        without = _logits(model, _as_row(model, blind, tree.positions()))[trunk : len(tree)]
    except NotImplementedError as error:
        return f"its attention is more than rows allow for ({error})"
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"a row of many fails in its forward ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    apart = (together - alone).abs().max().item()
    contrast = (without - alone).abs().max().item()
    if not apart <= _NEARER * contrast:
        return f"a trial tree differs from its records alone by {apart:.1e} (branches cut off: {contrast:.1e})"
    return None


def _plain(model: nn.Module, example: Example) -> dict[str, Any]:
    """An example alone, as any program would compute it."""
    return {"input_ids": torch.tensor([example.ids], device=_device(model))}


def _as_row(model: nn.Module, row: Row, positions: tuple[int, ...] | None = None) -> dict[str, Any]:
    batch: Any = collate_row(
        row, pad_id=0, windows=windows_of(model), cut=cut_of(model), examples=1, tokens_padded=len(row)
    )
    if positions is not None:
        batch["position_ids"][0, : len(row)] = torch.tensor(positions)
    for name in ("input_ids", "position_ids"):
        batch[name] = batch[name].to(_device(model))
    return model_inputs(model, batch)


def _device(model: nn.Module) -> torch.device:
    return innermost(model).get_input_embeddings().weight.device


def _logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """[T, V] of one row, in evaluation mode."""
    # bitsandbytes repacks its 4-bit layers for serving when they are called without gradients.
    hook = innermost(model).get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
    trained = model.training
    model.eval()
    try:
        return model(**inputs, use_cache=False).logits[0].detach().float().cpu()
    finally:
        hook.remove()
        model.train(trained)
