"""Likelihood: how well a model predicts the reference answers, target by target; shared beginnings are computed once.

N: targets of a batch, n: of a part of it; D: the model's width, V: the vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atomtune.batch.collate import Batch, Collator
from atomtune.batch.targets import TargetPlaces
from atomtune.data.records import Example
from atomtune.model.causal_lm import CausalLM
from atomtune.model.loss import Head, model_inputs
from atomtune.model.rotary import rotary_limit, split_at_limit
from atomtune.model.surprise import exact

#: How many logits are in memory at once: 128 MB in float32.
CHUNK_LOGITS = 32 * 2**20


@dataclass(frozen=True)
class TargetScores:
    """Sums over the learned tokens of one record; a token counts as often as it is learned."""

    nats: float
    right: int  # tokens that were the model's first choice
    tokens: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(self.tokens, 1)


@torch.no_grad()
def score_targets(model: CausalLM, records: Sequence[Sequence[Example]], collator: Collator) -> list[TargetScores]:
    """Score some records together; the beginnings that they share are computed once.

    records  the Examples of each record
    """
    lengths = [max((len(example.ids) for example in record), default=0) for record in records]
    scores: dict[int, TargetScores] = {}
    for places in split_at_limit(lengths, rotary_limit(model.config)):
        together = [records[place] for place in places]
        scores |= zip(places, _score_together(model, together, collator), strict=True)
    return [scores[place] for place in range(len(records))]


def _score_together(model: CausalLM, records: Sequence[Sequence[Example]], collator: Collator) -> list[TargetScores]:
    """Score some records in one batch."""
    examples = [example for record in records for example in record]
    batch = collator.lay(examples)
    nats, right = _scores(model, _on_device(batch, model.device))
    # Records with a common beginning share its targets; each record finds its own by its ids.
    places = TargetPlaces(batch)
    return [_of_record(record, places, nats, right) for record in records]


def _on_device(batch: Batch, device: torch.device) -> dict[str, object]:
    moved: dict[str, object] = {}
    for key, value in batch.items():
        moved[key] = value.to(device) if isinstance(value, torch.Tensor) else value
    return moved


def _scores(model: CausalLM, batch: dict[str, object]) -> tuple[list[float], list[bool]]:
    """For every target its surprise in nats, and whether it was the most likely token."""
    target = batch["target"]  # [N]
    assert isinstance(target, torch.Tensor)
    head = Head.of(model)
    predicting = head.hidden(model, batch) if head else None  # [N, D]
    if predicting is None:
        head = None
        all_logits = model(**model_inputs(model, batch), use_cache=False).logits  # [B, T, V]
        predicting = all_logits[batch["row"], batch["predicted_from"]]  # [N, V]
    vocabulary = model.config.get_text_config().vocab_size
    step = max(1, CHUNK_LOGITS // vocabulary)
    nats: list[float] = []
    right: list[bool] = []
    for start in range(0, len(target), step):
        part = predicting[start : start + step]
        part_target = target[start : start + step]  # [n]
        logits = exact(part if head is None else head.logits(part))  # [n, V]
        target_logits = logits.gather(1, part_target[:, None])[:, 0]  # [n]
        nats += (logits.logsumexp(-1) - target_logits).tolist()
        right += (logits.argmax(-1) == part_target).tolist()
    return nats, right


def _of_record(
    examples: Sequence[Example], places: TargetPlaces, nats: Sequence[float], right: Sequence[bool]
) -> TargetScores:
    total_nats, total_right, tokens = 0.0, 0, 0
    for example in examples:
        counted = [times for times in example.learn if times]
        for place, times in zip(places.of(example), counted, strict=True):
            assert place is not None  # the batch was laid out from these very records
            total_nats += nats[place] * times
            total_right += right[place] * times
            tokens += times
    assert math.isfinite(total_nats) or total_nats == math.inf
    return TargetScores(total_nats, total_right, tokens)
