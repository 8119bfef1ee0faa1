"""Cost: how many tokens each layout computes for a batch."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atomtune.batch.attention_plan import padded_length
from atomtune.batch.row import padded_tokens
from atomtune.batch.tree import graft
from atomtune.choices import Layout
from atomtune.data.records import Example

#: Batches that are sampled to see what a layout saves.
SAMPLED_BATCHES = 32


@dataclass(frozen=True)
class LayoutTokens:
    """Tokens that each layout computes for the same batches.

    heaviest  the same three for the heaviest of these batches, each by itself
    """

    padded: int
    packed: int
    tree: int
    heaviest: Mapping[Layout, int]

    @classmethod
    def of(cls, batches: Iterable[Sequence[Example]]) -> "LayoutTokens":
        counts: dict[Layout, list[int]] = {"padded": [], "packed": [], "tree": []}
        for examples in batches:
            counts["padded"].append(padded_tokens(examples))
            counts["packed"].append(padded_length(sum(len(example.ids) for example in examples)))
            counts["tree"].append(padded_length(len(graft(examples))))
        heaviest = {layout: max(tokens, default=0) for layout, tokens in counts.items()}
        return cls(sum(counts["padded"]), sum(counts["packed"]), sum(counts["tree"]), heaviest)


def sample_rows(count: int, size: int, *, seed: int) -> list[int]:
    """`size` different row numbers below `count`, or all of them where there are fewer."""
    return random.Random(seed).sample(range(count), min(count, size))


def batches_of(
    rows: Iterable[Mapping[str, Any]],
    per_batch: int,
    as_examples: Callable[[Mapping[str, Any]], Sequence[Example]],
) -> list[list[Example]]:
    """The examples of every `per_batch` stored rows, as a batch holds them."""
    records = [as_examples(row) for row in rows]
    starts = range(0, len(records), per_batch)
    return [[example for record in records[i : i + per_batch] for example in record] for i in starts]
