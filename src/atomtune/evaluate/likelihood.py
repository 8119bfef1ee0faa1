"""Likelihood: how well a model foresees the reference answers, target by target, beginnings shared."""

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
    on_device = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    surprise: dict[tuple[int, ...], tuple[float, bool]] = {}
    for path, nats, right in zip(_paths(batch), *_scores(model, on_device), strict=True):
        surprise[path] = (nats, right)
    return [_of_record(record, surprise) for record in records]


def _scores(model: CausalLM, batch: dict[str, object]) -> tuple[list[float], list[bool]]:
    """Of every target its surprise in nats, and whether it was the likeliest token."""
    target = batch["target"]
    assert isinstance(target, torch.Tensor)
    head = Head.of(model)
    if head is None:
        every = model(**model_inputs(model, batch), use_cache=False).logits
        picked = every[batch["row"], batch["predicted_from"]]  # [N, V]
    else:
        picked = head.hidden(model, batch)  # [N, D]
    width = model.config.get_text_config().vocab_size
    step = max(1, CHUNK_LOGITS // width)
    nats: list[float] = []
    right: list[bool] = []
    for start in range(0, len(target), step):
        part, wanted = picked[start : start + step], target[start : start + step]
        logits = part if head is None else head.logits(part)  # [n, V]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        chosen = logits.gather(1, wanted[:, None])[:, 0]
        nats += (logits.logsumexp(-1) - chosen).tolist()
        right += (logits.argmax(-1) == wanted).tolist()
    return nats, right


def _paths(batch: Batch) -> Iterator[tuple[int, ...]]:
    """Of every target, all ids of its record up to itself: they name it, whichever row or branch it stands in."""
    ids, plan = batch["input_ids"].cpu(), batch["plan"]
    places = zip(batch["row"].tolist(), batch["predicted_from"].tolist(), batch["target"].tolist(), strict=True)
    for row, source, target in places:
        path = ids[row, : source + 1]
        if plan is not None:
            seen = plan.until.cpu()[: source + 1] > source  # token k is on the path where source < until[k]
            path = path[seen]
        yield (*path.tolist(), target)


def _of_record(examples: Sequence[Example], surprise: dict[tuple[int, ...], tuple[float, bool]]) -> TargetScores:
    nats, right, tokens = 0.0, 0, 0
    for example in examples:
        for i, times in enumerate(example.learn):
            if times:
                target_nats, target_right = surprise[example.ids[: i + 1]]
                nats += target_nats * times
                right += target_right * times
                tokens += times
    assert math.isfinite(nats) or nats == math.inf
    return TargetScores(nats, right, tokens)
