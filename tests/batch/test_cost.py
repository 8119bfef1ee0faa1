"""Cost: sampled batches, the cheaper layout, and the estimate of a run's heaviest batch."""

from dataclasses import replace

import pytest

from atomtune.batch.attention_plan import padded_length
from atomtune.batch.cost import LayoutTokens, batches_of, heaviest_of_the_run, sample_rows
from atomtune.choices import Layout
from atomtune.data.records import Example

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "tree")


def record(number: int, examples: int, tokens: int) -> list[Example]:
    """The examples of one record, which share nothing."""
    return [
        Example((number, part, *range(tokens - 2)), (0,) * tokens, f"train.jsonl:{number}") for part in range(examples)
    ]


def test_each_layout_is_counted_with_its_own_padding_and_each_batch_alone():
    trunk = tuple(range(40))
    batches = [
        record(0, 3, 100),
        [*record(1, 1, 90), *record(2, 1, 30)],
        [*record(3, 1, 90), *record(4, 1, 30)],
        [Example((*trunk, 90 + n), (0,) * 41, f"train.jsonl:{n}") for n in range(2)],
    ]
    assert LayoutTokens.of(batches) == LayoutTokens(
        padded=300 + 180 + 180 + 82,
        packed=304 + 128 + 128 + 96,  # rows of 300, 120, 120 and 82 tokens, rounded up
        tree=304 + 128 + 128 + 48,
        heaviest={"padded": 300, "packed": 304, "tree": 304},
        lengths={"padded": 3, "packed": 3, "tree": 3},
        most_examples=3,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("examples", [1, 3])
def test_the_heaviest_batch_of_a_run_is_not_below_the_heaviest_sampled_one(layout, examples):
    # Regression: for conversations learned in several examples each, the limit was the longest example's tokens times
    # the records, a third of what was sampled here. So too few layers were recomputed, and `plan` promised too little.
    batches = [[example for number in range(4) for example in record(number, examples, 150)]]
    sampled, rounded = LayoutTokens.of(batches), padded_length(4 * examples * 150)
    assert sampled.heaviest[layout] == (4 * examples * 150 if layout == "padded" else rounded)
    heaviest = heaviest_of_the_run(sampled, layout, per_batch=4, longest_tokens=150)
    assert heaviest == rounded, "every example is as long as the longest"


@pytest.mark.parametrize(("per_batch", "measured"), [(4, 0.61), (16, 0.32), (64, 0.13)])
def test_the_margin_for_heavier_batches_is_a_little_above_the_measured_one(per_batch, measured):
    sampled = LayoutTokens.of([[example for number in range(per_batch) for example in record(number, 1, 150)]])
    heaviest = heaviest_of_the_run(sampled, "padded", per_batch=per_batch, longest_tokens=1_500)
    assert measured < heaviest / sampled.heaviest["padded"] - 1 < 1.3 * measured


def test_sampled_rows_are_different_ones_and_all_if_there_are_few():
    assert sorted(sample_rows(5, 9, seed=1)) == list(range(5))
    rows = sample_rows(1_000, 40, seed=1)
    assert len(set(rows)) == 40
    assert set(rows) <= set(range(1_000))
    assert rows == sample_rows(1_000, 40, seed=1) != sample_rows(1_000, 40, seed=2)


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


@pytest.mark.parametrize(("tree", "cheapest"), [(500, "tree"), (979, "tree"), (981, "packed"), (1_000, "packed")])
def test_trees_are_chosen_if_they_save_two_in_a_hundred_tokens(tree, cheapest):
    tokens = replace(LayoutTokens.of([record(0, 1, 160)]), packed=1_000, tree=tree)
    assert tokens.cheapest() == cheapest
