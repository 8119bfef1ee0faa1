"""Collate: Rows → the tensors of one batch.

Padded layout: one example per row, longest first, padded on the right. The attention mask marks padding, not its id.
Packed and tree layouts: all examples in one row, with a plan of its attention.
Letters: B rows, T positions, N targets.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from atomtune.batch.attention_plan import AttentionPlan, Cut, padded_length, plan_attention
from atomtune.batch.pack import pack
from atomtune.batch.row import Row, padded_tokens, single
from atomtune.batch.segment_plan import MixerMethod
from atomtune.batch.tree import graft
from atomtune.choices import Layout
from atomtune.data.records import Example


class _Targets(TypedDict):
    row: torch.Tensor
    predicted_from: torch.Tensor
    target: torch.Tensor
    learn: torch.Tensor
    targets: int


class Batch(_Targets):
    """The tensors of one step.

    input_ids                 [B, T]
    attention_mask            [B, T] for padded rows; None if there is a plan
    position_ids              [1, T] for a packed or tree row; None if the model counts positions itself
    plan                      the attention of a packed or tree row (B = 1), else None
    row, predicted_from, target, learn   [N]  for each target: its row, the index of the token whose hidden state
                                              predicts it, its id, and how many times it counts
    Not tensors, so reading them needs no synchronization with the device:
    targets         sum(learn)
    tokens_padded   number of tokens that the padded layout would compute for these examples
    records         how many records these examples are of
    origins         of the examples
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    plan: AttentionPlan | None
    tokens_padded: int
    records: int
    origins: list[str]


def collate_chains(rows: Sequence[Row], *, pad_id: int, records: int, tokens_padded: int) -> Batch:
    """A padded batch of chains, one per row.

    Longest first, as in the tutorial, so that the allocator gets the largest request first.
    """
    assert all(row.is_chain for row in rows), "a branching row needs its own attention, not padding"
    rows = sorted(rows, key=len, reverse=True)
    width = len(rows[0])
    ids, mask = [], []
    for row in rows:
        padding = width - len(row)
        ids.append([*row.ids, *[pad_id] * padding])
        mask.append([1] * len(row) + [0] * padding)
    return Batch(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        position_ids=None,
        plan=None,
        **_targets(rows),
        tokens_padded=tokens_padded,
        records=records,
        origins=[origin for row in rows for origin in row.origins],
    )


def collate_row(
    row: Row,
    *,
    windows: Sequence[int | None],
    records: int,
    tokens_padded: int,
    cut: Cut = "blocks",
    mixers: MixerMethod | None = None,
) -> Batch:
    """A batch of one row with all examples, and the plan of its attention."""
    width = padded_length(len(row))
    plan = plan_attention(row, windows=windows, width=width, cut=cut, mixers=mixers)
    # Padded with a real token. The embedding of a pad token may be all zeros, and a model that normalises it (Gemma 3n)
    # gets a NaN gradient there, which reaches every weight.
    padding = [row.ids[-1]] * (width - len(row))
    return Batch(
        input_ids=torch.tensor([[*row.ids, *padding]]),
        attention_mask=None,
        position_ids=plan.position[None],
        plan=plan,
        **_targets([row]),
        tokens_padded=tokens_padded,
        records=records,
        origins=list(row.origins),
    )


def _targets(rows: Sequence[Row]) -> _Targets:
    """The columns row, predicted_from, target and learn of the batch's targets, in the order of the rows."""
    targets: list[tuple[int, int, int, int]] = []
    for number, row in enumerate(rows):
        for i, times in enumerate(row.learn):
            if times:
                targets.append((number, row.parent[i], row.ids[i], times))
    columns = torch.tensor(targets, dtype=torch.long).reshape(-1, 4).T  # [4, N]
    of_row, predicted_from, target, learn = (column.contiguous() for column in columns)
    return _Targets(
        row=of_row,
        predicted_from=predicted_from,
        target=target,
        learn=learn,
        targets=sum(times for *_, times in targets),
    )


@dataclass(frozen=True, kw_only=True)
class Collator:
    """A DataLoader's collate_fn: rows of the example cache → the Batch of a layout.

    as_examples     the Examples of one stored row (data/example_table.py)
    windows         the sliding windows of the model's layers; None: full attention
    cut             how a row's attention is computed: blocks on a CPU, spans on a GPU
    mixers          how layers that carry a state from token to token compute a row; None if the model has none
    """

    layout: Layout
    pad_id: int
    as_examples: Callable[[Mapping[str, Any]], Sequence[Example]]
    windows: Sequence[int | None] = (None,)
    cut: Cut = "blocks"
    mixers: MixerMethod | None = None

    def __call__(self, stored: Sequence[Mapping[str, Any]]) -> Batch:
        examples = [example for row in stored for example in self.as_examples(row)]
        return self.lay(examples, records=len(stored))

    def lay(self, examples: Sequence[Example], *, records: int | None = None) -> Batch:
        """The examples as one batch.

        records  number of records that they belong to; default: one each
        """
        counts = {"records": records or len(examples), "tokens_padded": padded_tokens(examples)}
        if self.layout == "padded":
            return collate_chains([single(example) for example in examples], pad_id=self.pad_id, **counts)
        row = graft(examples) if self.layout == "tree" else pack(examples)
        return collate_row(row, windows=self.windows, cut=self.cut, mixers=self.mixers, **counts)
