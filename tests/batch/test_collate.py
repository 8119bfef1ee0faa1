"""Laws of a padded batch, compared with labels that are shifted as transformers' models shift them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atomtune.batch.collate import Batch, Collator, collate_chains
from atomtune.batch.row import Row, single
from atomtune.data.records import Example

PAD = 0
#: Ids from 0 on, so that the pad id also occurs in texts. The first token is never a target.
EXAMPLES = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=2, max_size=9), min_size=1, max_size=5
).map(
    lambda columns: [
        Example(tuple(i for i, _ in one), (0, *(times for _, times in one[1:])), f"train.jsonl:{n}")
        for n, one in enumerate(columns, start=1)
    ]
)
same_every_time = settings(derandomize=True, database=None, deadline=None, max_examples=40)


def as_stored(example: Example) -> dict:
    return {"ids": list(example.ids), "learn": list(example.learn), "origin": example.origin}


def collated(examples: list[Example], pad_id: int = PAD) -> Batch:
    collate = Collator(
        layout="padded",
        pad_id=pad_id,
        as_examples=lambda row: (Example(tuple(row["ids"]), tuple(row["learn"]), row["origin"]),),
    )
    return collate([as_stored(example) for example in examples])


def by_origin(batch: Batch, examples: list[Example]) -> list[tuple[int, Example]]:
    """Each row's number and the example in it."""
    known = {example.origin: example for example in examples}
    return [(r, known[origin]) for r, origin in enumerate(batch["origins"])]


@same_every_time
@given(EXAMPLES)
def test_targets_match_shifted_labels(examples):
    # The oracle does what a causal model in transformers does: logits[:, :-1] against labels[:, 1:].
    # Catches any off-by-one: predicted_from = i instead of parent[i], target = ids[i + 1], a shift done twice.
    batch = collated(examples)
    expected = []
    for r, example in by_origin(batch, examples):
        labels = [token if times else -100 for token, times in zip(example.ids, example.learn, strict=True)]
        expected += [(r, position, label) for position, label in enumerate(labels[1:]) if label != -100]
    told = zip(batch["row"].tolist(), batch["predicted_from"].tolist(), batch["target"].tolist(), strict=True)
    assert sorted(told) == sorted(expected)


@same_every_time
@given(EXAMPLES)
def test_every_example_is_whole_and_left_aligned_in_its_own_row(examples):
    # Catches left padding, truncation to the shortest, and a lost or repeated row.
    batch = collated(examples)
    assert sorted(batch["origins"]) == sorted(example.origin for example in examples)
    for r, example in by_origin(batch, examples):
        assert batch["input_ids"][r, : len(example.ids)].tolist() == list(example.ids)


@same_every_time
@given(EXAMPLES)
def test_attention_mask_marks_padding_by_position_not_by_token_id(examples):
    # Catches mask = ids != pad_id, which would hide real tokens that have the pad's id (0 is UNK in the tutorial).
    batch = collated(examples)
    width = max(len(example.ids) for example in examples)
    for r, example in by_origin(batch, examples):
        n = len(example.ids)
        assert batch["attention_mask"][r].tolist() == [1] * n + [0] * (width - n)
        assert batch["input_ids"][r, n:].tolist() == [PAD] * (width - n)


@same_every_time
@given(EXAMPLES)
def test_no_target_is_padding_or_predicted_from_padding(examples):
    # Catches learn marks laid out for the padded width.
    batch = collated(examples)
    real = batch["attention_mask"].bool()
    assert real[batch["row"], batch["predicted_from"]].all()
    assert real[batch["row"], batch["predicted_from"] + 1].all()


@same_every_time
@given(EXAMPLES)
def test_batch_counts_are_the_sums_over_its_examples(examples):
    # Catches counting tokens instead of adding `learn`, which would change the mean loss.
    batch = collated(examples)
    assert batch["targets"] == sum(sum(example.learn) for example in examples) == batch["learn"].sum().item()
    assert batch["tokens_padded"] == batch["input_ids"].numel()
    assert batch["records"] == len(examples) == len(batch["input_ids"])


@pytest.mark.parametrize("layout", ["padded", "packed", "tree"])
def test_a_batch_counts_its_records_and_names_the_origins_of_all_examples(layout):
    # A conversation may be learned in several examples. Speed is told in records, and a loss that is not finite is
    # reported with the origins.
    def as_examples(row: dict) -> list[Example]:
        return [Example((*range(20), row["number"], part), (0,) * 21 + (1,), row["origin"]) for part in range(3)]

    collate = Collator(layout=layout, pad_id=PAD, as_examples=as_examples)
    batch = collate([{"number": number, "origin": f"train.jsonl:{number}"} for number in range(2)])
    assert batch["records"] == 2
    assert sorted(batch["origins"]) == ["train.jsonl:0"] * 3 + ["train.jsonl:1"] * 3
    assert batch["tokens_padded"] == 6 * 22


def test_the_longest_comes_first_and_equals_keep_their_order():
    # The largest allocation then comes first.
    lengths = {"a:1": 2, "a:2": 5, "a:3": 3, "a:4": 5}
    batch = collated([Example((7,) * n, (0,) * (n - 1) + (1,), origin) for origin, n in lengths.items()])
    assert batch["origins"] == ["a:2", "a:4", "a:3", "a:1"]


def test_a_token_that_is_learned_twice_counts_twice():
    # Two records may share an answer's token; counted once, it would have half its weight.
    row = Row((1, 5, 6), (-1, 0, 1), (3, 3, 3), (0, 2, 1), ("a:1", "a:2"))
    batch = collate_chains([row], pad_id=PAD, records=2, tokens_padded=6)
    assert batch["learn"].tolist() == [2, 1]
    assert batch["targets"] == 3
    assert (batch["records"], batch["tokens_padded"], batch["origins"]) == (2, 6, ["a:1", "a:2"])


def test_examples_without_targets_make_a_batch_without_targets():
    # An evaluation set may contain such examples; torch.tensor([]) would be float and have the wrong shape.
    batch = collated([Example((1, 2, 3), (0, 0, 0), "a:1"), Example((1, 2), (0, 0), "a:2")])
    assert batch["targets"] == 0
    for name in ("row", "predicted_from", "target", "learn"):
        assert batch[name].shape == (0,)
        assert batch[name].dtype == torch.long


def test_every_tensor_is_int64():
    # Embeddings and index selection accept only int64.
    batch = collated([Example((1, 2, 3), (0, 0, 1), "a:1"), Example((1, 2), (0, 1), "a:2")])
    assert {v.dtype for v in batch.values() if isinstance(v, torch.Tensor)} == {torch.long}


def test_collating_a_branching_row_as_a_chain_fails():
    fork = Row((1, 2, 3), (-1, 0, 0), (3, 2, 3), (0, 1, 1), ("a:1", "a:2"))
    with pytest.raises(AssertionError, match="branching"):
        collate_chains([single(Example((1, 2), (0, 1), "a:3")), fork], pad_id=PAD, records=3, tokens_padded=6)
