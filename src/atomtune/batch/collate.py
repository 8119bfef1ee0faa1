"""Collate: Rows → the tensors of one batch.

Before: row.py.  After: model.loss.
Padded layout: one example a row, longest first, padded on the right; padding is known by its position, not by its id.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch

from atomtune.batch.row import Row, padded_tokens, single
from atomtune.data.records import Example


class Batch(TypedDict):
    """Tensors of one step.

    input_ids, attention_mask, position_ids   [B, T]
    row, source, target, learn                [N]  the N targets: their row, the position they are predicted from,
                                                   the id to predict and how often it counts
    Plain numbers, known without asking the device:
    targets         sum(learn)
    tokens_padded   what the padded layout computes for these examples
    examples        how many there are; origins names their records
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    row: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    learn: torch.Tensor
    targets: int
    tokens_padded: int
    examples: int
    origins: list[str]


def collate_chains(rows: Sequence[Row], *, pad_id: int, examples: int, tokens_padded: int) -> Batch:
    """Lay chain rows under each other, longest first.

    Longest first, as the tutorial does: the allocator meets the largest request first.
    """
    assert all(row.is_chain for row in rows), "a branching row needs its own attention, not padding"
    rows = sorted(rows, key=len, reverse=True)
    width = len(rows[0])
    real = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    targets = [
        (r, row.parent[i], row.ids[i], times)
        for r, row in enumerate(rows)
        for i, times in enumerate(row.learn)
        if times
    ]
    columns = torch.tensor(targets, dtype=torch.long).reshape(-1, 4).T  # [4, N]
    return Batch(
        input_ids=torch.tensor([[*row.ids, *[pad_id] * (width - len(row))] for row in rows]),
        attention_mask=torch.tensor(real),
        # Padding stays at the last real position, so that no model is asked for a position it does not have.
        position_ids=torch.tensor([[*row.positions(), *[len(row) - 1] * (width - len(row))] for row in rows]),
        row=columns[0].contiguous(),
        source=columns[1].contiguous(),
        target=columns[2].contiguous(),
        learn=columns[3].contiguous(),
        targets=sum(times for *_, times in targets),
        tokens_padded=tokens_padded,
        examples=examples,
        origins=[origin for row in rows for origin in row.origins],
    )


def padded_collator(pad_id: int, as_example: Callable[[Mapping[str, Any]], Example]) -> Callable[[Sequence], Batch]:
    """A DataLoader's collate_fn for the padded layout."""

    def collate(stored: Sequence[Mapping[str, Any]]) -> Batch:
        examples = [as_example(row) for row in stored]
        rows = [single(example) for example in examples]
        return collate_chains(rows, pad_id=pad_id, examples=len(examples), tokens_padded=padded_tokens(examples))

    return collate
