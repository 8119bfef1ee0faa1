"""Likelihood: the scores of a batch equal those of each record alone, computed from all its logits."""

import tracemalloc

import pytest
import torch
from pytest import approx
from transformers import AutoModelForCausalLM

from atomtune.batch.collate import Collator
from atomtune.data.records import Example
from atomtune.evaluate import likelihood
from atomtune.evaluate.likelihood import TargetScores, score_targets
from atomtune.model.layout_support import why_padded, windows_of


def records() -> list[tuple[Example, ...]]:
    """Records with equal beginnings; one is learned twice, one has two answers, and one has two Examples."""
    shared = tuple(range(20, 50))
    first = Example((*shared, 61, 62, 63), (0,) * 31 + (1, 1), "a:1")
    twice = Example((*shared, 61, 71), (0,) * 31 + (2,), "a:2")
    answers = Example((*shared, 81, 82, 83, 84), (0,) * 30 + (1, 0, 0, 1), "a:3")
    short = Example((5, 6, 7), (0, 0, 1), "a:3")
    return [(first,), (twice,), (short,), (answers, short), (first,)]


def plainly(model, examples: tuple[Example, ...]) -> TargetScores:
    nats, right, tokens = 0.0, 0, 0
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.ids])).logits[0].double()
        for i, times in enumerate(example.learn):
            if times:
                scores = logits[i - 1].log_softmax(-1)
                nats -= times * float(scores[example.ids[i]])
                right += times * (int(scores.argmax()) == example.ids[i])
                tokens += times
    return TargetScores(nats, right, tokens)


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_batched_scores_equal_those_of_each_record_alone(models, family, layout, monkeypatch):
    # As with a large vocabulary, one target at a time; and as with long rotary scales, short records in another batch.
    monkeypatch.setattr(likelihood, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(likelihood, "rotary_limit", lambda config: 10)
    plain = AutoModelForCausalLM.from_pretrained(models(family), dtype=torch.float64).eval()
    expected = [plainly(plain, record) for record in records()]
    model = AutoModelForCausalLM.from_pretrained(models(family), dtype=torch.float64).eval()
    assert why_padded(model) is None
    windows = windows_of(model) if layout == "tree" else (None,)
    collator = Collator(layout=layout, pad_id=0, as_examples=lambda row: (), windows=windows)
    scores = score_targets(model, records(), collator)
    for ours, theirs in zip(scores, expected, strict=True):
        # transformers' RMSNorm computes in float32 in every dtype.
        assert ours.nats == approx(theirs.nats, rel=1e-5)
        assert (ours.right, ours.tokens) == (theirs.right, theirs.tokens)


def test_memory_for_a_long_record_does_not_grow_quadratically(models):
    """Regression: the key of each target was all ids before it, 385 MB of keys for 8,000 tokens."""
    model = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32).eval()
    collator = Collator(layout="padded", pad_id=0, as_examples=lambda row: ())
    ids = torch.randint(10, 300, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    record = (Example(tuple(ids), (0,) + (1,) * 3999, "long:1"),)
    tracemalloc.start()
    (scores,) = score_targets(model, [record], collator)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert scores.tokens == 3999 and peak < 20 * 2**20  # 96 MB before
