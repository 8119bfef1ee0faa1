"""Cost: sampled batches, the cheaper layout, and the estimate of a run's heaviest batch."""

from dataclasses import replace

import pytest

from atomtune.batch.cost import LayoutTokens, batches_of, heaviest_of_the_run
from atomtune.choices import Layout
from atomtune.data.records import Example

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "tree")


def record(number: int, examples: int, tokens: int) -> list[Example]:
    """The examples of one record, which share nothing."""
    return [
        Example((number, part, *range(tokens - 2)), (0,) * tokens, f"train.jsonl:{number}") for part in range(examples)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("examples", [1, 3])
def test_the_heaviest_batch_of_a_run_is_not_below_the_heaviest_sampled_one(layout, examples):
    # Regression: for conversations learned in several examples each, the limit was the longest example's tokens times
    # the records, a third of what was sampled here. So too few layers were recomputed, and `plan` promised too little.
    batches = [[example for number in range(4) for example in record(number, examples, 160)]]
    sampled = LayoutTokens.of(batches)
    assert sampled.heaviest[layout] == 4 * examples * 160
    heaviest = heaviest_of_the_run(sampled, layout, per_batch=4, longest_tokens=160)
    assert heaviest == sampled.heaviest[layout], "every example is as long as the longest"
    more = heaviest_of_the_run(sampled, layout, per_batch=4, longest_tokens=1_600)
    assert sampled.heaviest[layout] < more < 2 * sampled.heaviest[layout], "other batches may be heavier"


def test_a_run_whose_sampled_batches_are_small_allows_for_full_ones():
    sampled = LayoutTokens.of([record(0, 1, 160)])
    assert heaviest_of_the_run(sampled, "padded", per_batch=1, longest_tokens=320) == 320


def test_a_batch_has_all_examples_of_its_rows_and_the_last_one_those_that_are_left():
    rows = [{"number": number, "examples": 1 + number % 2} for number in range(5)]
    batches = batches_of(rows, 2, lambda row: record(row["number"], row["examples"], 4))
    assert [[example.origin for example in batch] for batch in batches] == [
        ["train.jsonl:0", "train.jsonl:1", "train.jsonl:1"],
        ["train.jsonl:2", "train.jsonl:3", "train.jsonl:3"],
        ["train.jsonl:4"],
    ]


@pytest.mark.parametrize(("tree", "cheapest"), [(500, "tree"), (970, "tree"), (990, "packed"), (1_000, "packed")])
def test_trees_are_chosen_if_they_save_two_in_a_hundred_tokens(tree, cheapest):
    tokens = replace(LayoutTokens.of([record(0, 1, 160)]), packed=1_000, tree=tree)
    assert tokens.cheapest() == cheapest
