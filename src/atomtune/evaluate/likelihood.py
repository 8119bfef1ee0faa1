"""Likelihood: how well a model foresees the reference answers, target by target, beginnings shared.

N targets of a batch, n of them at once; D the model's width, V the vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from atomtune.batch.collate import Batch, Collator
from atomtune.data.records import Example
from atomtune.model.causal_lm import CausalLM
from atomtune.model.loss import Head, model_inputs

#: Logits held at once, in numbers: 128 MB in float32.
CHUNK_LOGITS = 32 * 2**20


@dataclass(frozen=True)
class TargetScores:
    """Of the learned tokens of one record, each counted as often as it is learned."""

    nats: float
    right: int  # tokens that were the model's first choice
    tokens: int


@torch.no_grad()
def score_targets(model: CausalLM, records: Sequence[Sequence[Example]], collator: Collator) -> list[TargetScores]:
    """Score some records in one batch; what they share is computed once.

    records  of each record the Examples it became
    """
    examples = [example for record in records for example in record]
    batch = collator.lay(examples)
    nats, right = _scores(model, _on_device(batch, model.device))
    # Records with a common beginning share its targets; by its path a record finds those that are its own.
    scores = dict(zip(_paths(batch), zip(nats, right, strict=True), strict=True))
    return [_of_record(record, scores) for record in records]


def _on_device(batch: Batch, device: torch.device) -> dict[str, object]:
    moved: dict[str, object] = {}
    for key, value in batch.items():
        moved[key] = value.to(device) if isinstance(value, torch.Tensor) else value
    return moved


def _scores(model: CausalLM, batch: dict[str, object]) -> tuple[list[float], list[bool]]:
    """Of every target its surprise in nats, and whether it was the likeliest token."""
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
        logits = part if head is None else head.logits(part)  # [n, V]
        if logits.dtype != torch.float64:
            logits = logits.float()
        target_logits = logits.gather(1, part_target[:, None])[:, 0]  # [n]
        nats += (logits.logsumexp(-1) - target_logits).tolist()
        right += (logits.argmax(-1) == part_target).tolist()
    return nats, right


def _paths(batch: Batch) -> Iterator[tuple[int, ...]]:
    """Of every target, all ids of its record up to itself: they name it, whichever row or branch it stands in."""
    ids = batch["input_ids"].cpu()  # [B, T]
    until = None if batch["plan"] is None else batch["plan"].until.cpu()
    rows = batch["row"].tolist()
    predicting_places = batch["predicted_from"].tolist()
    targets = batch["target"].tolist()
    for row, place, target in zip(rows, predicting_places, targets, strict=True):
        path = ids[row, : place + 1]
        if until is not None:
            path = path[until[: place + 1] > place]  # the tokens that `place` sees: k <= place < until[k]
        yield (*path.tolist(), target)


def _of_record(examples: Sequence[Example], scores: dict[tuple[int, ...], tuple[float, bool]]) -> TargetScores:
    nats, right, tokens = 0.0, 0, 0
    for example in examples:
        for i, times in enumerate(example.learn):
            if times == 0:
                continue
            target_nats, target_right = scores[example.ids[: i + 1]]
            nats += target_nats * times
            right += target_right * times
            tokens += times
    assert math.isfinite(nats) or nats == math.inf
    return TargetScores(nats, right, tokens)
