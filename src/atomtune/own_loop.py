"""Own loop: rows with shared beginnings, for a training loop other than atomtune's.

    sharing = share_prefixes(model)
    for batch in DataLoader(examples, batch_size=16, shuffle=True, collate_fn=sharing.collate):
        loss = sharing.loss(model, batch)
        loss.backward()

Law: loss and gradients equal those of a padded batch of the same examples (tests/test_own_loop.py), except for
dropout, which is drawn once for a shared token.
Letters: N targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from atomtune.batch.collate import Collator
from atomtune.choices import Layout
from atomtune.data.records import Example
from atomtune.errors import BadData, BadSettings
from atomtune.model.layout_support import collator_for, why_padded
from atomtune.model.loss import innermost, target_nats

#: The label that transformers' losses ignore.
IGNORED = -100


@dataclass(frozen=True)
class PrefixSharing:
    """How batches are laid out for one model, and their loss.

    layout  tree: shared beginnings are computed once; padded: trees would not be exact for this model, see `reason`
    """

    layout: Layout
    reason: str | None
    collator: Collator

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A DataLoader's collate_fn: examples with `input_ids` and `labels` → one batch.

        labels  -100 for tokens that are not learned, as in transformers; without labels, all tokens are learned
        attention_mask  0 for padding, which is removed
        seq_lengths  lengths of the examples in a packed row (TRL), which are laid out separately again
        The batch has `labels` [1 + N] only for the Trainer, which counts a step's targets by them.
        """
        laid = self.collator(examples)
        learned = laid["target"].repeat_interleave(laid["learn"])
        return {**laid, "labels": torch.cat([torch.tensor([IGNORED]), learned])}

    def loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Mean nats per learned token, of this batch or of all batches of a step.

        num_items_in_batch  learned tokens in all batches of the step (the Trainer passes it); default: this batch's.
            With several processes whose gradients are averaged, it counts the tokens of all. Then the loss must be
            multiplied by the number of processes, as the Trainer does with its own.
        label_smoothing  the share of each target that is spread over the whole vocabulary
        Raises BadSettings if NEFTune's noise would be drawn per row instead of per example.
        """
        embedding = innermost(model).get_input_embeddings()
        if self.layout == "tree" and embedding.training and getattr(embedding, "neftune_noise_alpha", None):
            raise BadSettings(
                [
                    "neftune_noise_alpha: its noise is drawn for each example, by the length of its row, which shared "
                    "beginnings do not have. Leave it out, or train without share_prefixes."
                ]
            )
        device = embedding.weight.device
        nats, count = target_nats(model, send_to_device(dict(batch), device), label_smoothing=label_smoothing)
        targets = count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=nats.device)
        return nats / targets.clamp(min=1)


def share_prefixes(model: nn.Module) -> PrefixSharing:
    """Prepare a causal LM, with or without PEFT, for rows with shared beginnings.

    A small tree is computed and compared with its records one at a time. Only if they are equal is the model's
    attention replaced. Batches without shared rows, and `generate`, work as before.
    """
    reason = why_padded(model)  # type: ignore[arg-type]
    layout: Layout = "tree" if reason is None else "padded"
    config = innermost(model).config.get_text_config()
    # Padding is masked by position, so any token will do.
    pad_id = getattr(config, "pad_token_id", None) or 0
    collator = collator_for(model, layout, pad_id=pad_id, as_examples=_as_examples)  # type: ignore[arg-type]
    return PrefixSharing(collator.layout, reason, collator)


def _as_examples(values: Mapping[str, Any]) -> tuple[Example, ...]:
    """The examples of a row: the row itself, or those packed into it. Raises BadData for an invalid row."""
    if "seq_lengths" not in values:
        return (_as_example(values),)
    lengths = [int(length) for length in values["seq_lengths"]]
    if sum(lengths) != len(values["input_ids"]):
        raise BadData(
            f"A packed row has {len(values['input_ids'])} input_ids and seq_lengths of {sum(lengths)} tokens."
        )
    columns = [name for name in ("input_ids", "labels", "attention_mask") if name in values]
    ends = accumulate(lengths)
    return tuple(
        _as_example({name: values[name][end - length : end] for name in columns})
        for length, end in zip(lengths, ends, strict=True)
    )


def _as_example(values: Mapping[str, Any]) -> Example:
    """Ids and how often each is learned, from `input_ids` and `labels`. Raises BadData if these do not match."""
    ids = [int(token) for token in values["input_ids"]]
    labels = [int(label) for label in values.get("labels", ids)]
    if len(labels) != len(ids):
        raise BadData(f"An example has {len(ids)} input_ids and {len(labels)} labels.")
    real = [bool(mark) for mark in values.get("attention_mask", [1] * len(ids))]
    kept_ids: list[int] = []
    learn: list[int] = []
    for token, label, is_real in zip(ids, labels, real, strict=True):
        if not is_real:
            continue
        if label not in (IGNORED, token):
            raise BadData(
                f"An example's label at token {len(kept_ids)} is {label}, where input_ids has {token}. "
                f"Expected {IGNORED} or the same id: labels are not shifted."
            )
        # Nothing predicts the first token; transformers' shift leaves it out too.
        learn.append(int(label != IGNORED and len(kept_ids) > 0))
        kept_ids.append(token)
    return Example(tuple(kept_ids), tuple(learn), "own loop")
