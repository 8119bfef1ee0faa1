"""Random batches: in every layout, loss and gradients are those of plain transformers + PEFT, one record at a time.

transformers computes norms, the delta rule and some softmaxes in float32 whatever the dtype. Here they too compute in
float64, so the two sides agree to 1e-11: a fault that is smaller than the rounding of float32 shows as well.
"""

import copy
import functools
import sys
import types
from random import Random
from typing import Any

import pytest
import torch

from atomtune.batch import blocks, collate
from atomtune.batch.collate import Collator
from atomtune.batch.tree import graft
from atomtune.choices import Layout
from atomtune.data.records import Example
from atomtune.model import block_attention, loss, row_attention
from atomtune.model.fused_layers import fuse_layers
from atomtune.model.layout_support import mixer_method_of, why_padded, windows_of
from atomtune.model.loss import innermost, target_nats
from tests.hybrids import HYBRIDS, hybrid
from tests.model.test_layout_support import WORDS, Result, build, gradients, with_adapter

EXACT = 1e-11
#: family → config values beyond those of the other tests: windows shorter than most records, and not of chunks' sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 2},
    "gemma2": {"sliding_window": 7},  # soft caps
    "granite_swa": {"sliding_window": 7},  # sinks
    "qwen3_5_text": {},
    "lfm2": {},
    "mamba2": {},
}


class _Float64Torch(types.ModuleType):
    """torch for a model's file, in which float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def compute_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the models that are loaded so far compute nothing in float32."""
    wide, as_float32 = _Float64Torch("torch"), torch.Tensor.float
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and vars(module).get("torch") is torch:
            monkeypatch.setattr(module, "torch", wide)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else as_float32(x))


def records(draw: Random) -> list[Example]:
    """One to eight records: equal ones, prefixes of others, shared beginnings of any depth, empty prompts."""
    words, longest = draw.choice([2, 3, 8, WORDS - 3]), draw.choice([6, 20, 60, 150, 300])
    examples: list[Example] = []
    for n in range(draw.randint(1, 8)):
        known = draw.choice(examples).ids if examples and draw.random() < 0.75 else ()
        prefix = known[: draw.choice([0, 1, 2, len(known) // 2, len(known), draw.randint(0, len(known))])]
        more = draw.choice([0, 1, draw.randint(1, longest)]) if prefix else draw.randint(1, longest)
        ids = (*prefix, *(3 + draw.randrange(words) for _ in range(more)))[:300]
        marks = draw.choice([(0, 0), (1, 1), (0, 1), (0, 1, 1, 2)])
        examples.append(Example(ids, (0, *draw.choices(marks, k=len(ids) - 1)), f"train.jsonl:{n}"))
    return examples


def vary(draw: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what changes only how a result is computed."""
    monkeypatch.setattr(blocks, "CHUNK_SIZES", draw.choice([blocks.CHUNK_SIZES, (4,), (16,), (7, 30)]))
    monkeypatch.setattr(block_attention, "MOST_KEPT", draw.choice([0, 8, 1_000]))
    monkeypatch.setattr(loss, "LEAST_TARGETS", draw.choice([1, 3, 128]))
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(collate, "graft", functools.partial(graft, least_saved=draw.choice([1, 5, 16])))


def one_at_a_time(model: Any, examples: list[Example], label_smoothing: float) -> Result:
    total = 0.0
    model.zero_grad()
    for example in examples:
        scores = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0].log_softmax(-1)
        before = scores[:-1]  # the logits from which each token after the first is predicted
        own = before.gather(-1, torch.tensor(example.ids[1:])[:, None])[:, 0]
        each = -(1 - label_smoothing) * own - label_smoothing * before.mean(-1)
        nats = (each * torch.tensor(example.learn[1:])).sum()
        nats.backward()
        total += nats.item()
    return Result(total, gradients(model))


def at_once(model: Any, batches: list[list[Example]], collator: Collator, label_smoothing: float) -> Result:
    """The sum over several batches, as in a step with accumulation."""
    total, count = 0.0, 0
    model.zero_grad()
    for examples in batches:
        batch = collator.lay(examples)
        nats, learned = target_nats(model, batch, label_smoothing=label_smoothing)
        assert batch["targets"] == int(learned)
        nats.backward()
        total, count = total + nats.item(), count + batch["targets"]
    assert count == sum(sum(example.learn) for examples in batches for example in examples)
    return Result(total, gradients(model))


def recompute(model: Any, is_wanted: bool) -> None:
    """Switch gradient checkpointing on or off."""
    inner = innermost(model)
    if is_wanted:
        model.enable_input_require_grads()
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        inner.gradient_checkpointing_disable()
    model.train(is_wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_batches_give_the_loss_and_gradients_of_one_record_at_a_time(monkeypatch, family):
    plain = hybrid(family) if family in HYBRIDS else with_adapter(build(family, **FAMILIES[family]))
    compute_in_float64(monkeypatch)
    models = {name: copy.deepcopy(plain) for name in ("rows", "padded")}
    assert why_padded(models["rows"]) is None
    for model in models.values():
        fuse_layers(model, input_ids=torch.zeros(1, 2, dtype=torch.long))
    for seed in range(5):
        draw = Random(f"{seed} {family}")
        batches = [records(draw) for _ in range(draw.randint(1, 2))]
        vary(draw, monkeypatch)
        label_smoothing, method = draw.choice([0.0, 0.1]), draw.choice(["blocks", "spans", "mask"])
        monkeypatch.setattr(row_attention, "method_of", lambda *_, method=method, **__: method)
        theirs = one_at_a_time(plain, [example for examples in batches for example in examples], label_smoothing)
        layouts: tuple[Layout, ...] = ("tree", "packed", "padded")
        for layout in layouts:
            model = models["padded" if layout == "padded" else "rows"]
            recompute(model, draw.random() < 0.4)
            collator = Collator(
                layout=layout,
                pad_id=0,
                as_examples=lambda _row: (),
                windows=windows_of(model),
                cut="spans" if method == "spans" else "blocks",
                mixers=mixer_method_of(model),
            )
            ours = at_once(model, batches, collator, label_smoothing)
            size = sum(gradient.norm() ** 2 for gradient in theirs.gradients.values()) ** 0.5
            worst = max((ours.gradients[name] - one).norm() for name, one in theirs.gradients.items())
            assert abs(ours.nats - theirs.nats) <= EXACT * theirs.nats, (seed, layout, method)
            assert worst <= EXACT * size, (seed, layout, method)
