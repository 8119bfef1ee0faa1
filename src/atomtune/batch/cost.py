"""Cost: how many tokens each layout computes, estimated from sampled batches."""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atomtune.batch.attention_plan import padded_length
from atomtune.batch.row import padded_tokens
from atomtune.batch.tree import graft
from atomtune.choices import Layout
from atomtune.data.records import Example

#: Number of batches sampled to compare the layouts.
SAMPLED_BATCHES = 32
#: Trees are chosen only if they save at least this share of the packed layout's tokens: planning them takes time.
_WORTH = 0.02


@dataclass(frozen=True)
class LayoutTokens:
    """Numbers of tokens that each layout computes for the same batches.

    padded, packed, tree   the sum over all batches
    heaviest  for each layout, the tokens of its heaviest batch
    lengths   for each layout, how many different numbers of tokens its batches have
    most_examples  of one batch; more than its records if some of these have several examples each
    """

    padded: int
    packed: int
    tree: int
    heaviest: Mapping[Layout, int]
    lengths: Mapping[Layout, int]
    most_examples: int

    @classmethod
    def of(cls, batches: Iterable[Sequence[Example]]) -> "LayoutTokens":
        """Lay out each batch in all three layouts and count; lengths of packed and tree rows are rounded up."""
        counts: dict[Layout, list[int]] = {"padded": [], "packed": [], "tree": []}
        most_examples = 0
        for examples in batches:
            most_examples = max(most_examples, len(examples))
            counts["padded"].append(padded_tokens(examples))
            counts["packed"].append(padded_length(sum(len(example.ids) for example in examples)))
            counts["tree"].append(padded_length(len(graft(examples))))
        heaviest = {layout: max(tokens, default=0) for layout, tokens in counts.items()}
        lengths = {layout: len(set(tokens)) for layout, tokens in counts.items()}
        return cls(sum(counts["padded"]), sum(counts["packed"]), sum(counts["tree"]), heaviest, lengths, most_examples)

    def of_layout(self, layout: Layout) -> int:
        """The sum of one layout."""
        return {"padded": self.padded, "packed": self.packed, "tree": self.tree}[layout]

    def cheapest(self) -> Layout:
        """The cheaper of the two layouts without padding: tree, if it saves enough over packed."""
        return "tree" if self.tree < self.packed * (1 - _WORTH) else "packed"


def heaviest_of_the_run(sampled: LayoutTokens, layout: Layout, *, per_batch: int, longest_tokens: int) -> int:
    """Estimate the tokens of the heaviest batch of a run in this layout from SAMPLED_BATCHES batches.

    per_batch       records in a batch
    longest_tokens  tokens of the longest example
    The margin was measured on the demo's dialogues: in one draw of twenty, the heaviest of 320 batches exceeded the
    heaviest of 32 by 61 % at 4 records per batch, by 32 % at 16 and by 13 % at 64.
    """
    margin = 1 + 1.3 / math.sqrt(per_batch)
    most_examples = max(per_batch, sampled.most_examples)
    return min(math.ceil(sampled.heaviest[layout] * margin), padded_length(most_examples * longest_tokens))


def sample_rows(count: int, size: int, *, seed: int) -> list[int]:
    """`size` different row numbers below `count`, in random order; all of them if there are fewer."""
    return random.Random(seed).sample(range(count), min(count, size))


def batches_of(
    rows: Iterable[Mapping[str, Any]],
    per_batch: int,
    as_examples: Callable[[Mapping[str, Any]], Sequence[Example]],
) -> list[list[Example]]:
    """The examples of stored rows, grouped into batches of `per_batch` rows."""
    batches: list[list[Example]] = []
    for number, row in enumerate(rows):
        if number % per_batch == 0:
            batches.append([])
        batches[-1] += as_examples(row)
    return batches
