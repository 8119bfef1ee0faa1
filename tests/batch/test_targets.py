"""Law: the context of each target, token by token from the beginning of the row, is the record's own."""

import pytest

from atomtune.batch.collate import Batch, Collator
from atomtune.batch.targets import TargetPlaces
from atomtune.choices import Layout
from atomtune.data.records import Example
from tests.batch.test_tree import forests


def laid(examples: list[Example], layout: Layout) -> Batch:
    return Collator(layout=layout, pad_id=0, as_examples=lambda row: ()).lay(examples)


def whole_ways(batch: Batch) -> list[tuple[int, ...]]:
    """For each target, the ids it is predicted from according to the mask, and its own id."""
    ids, ways = batch["input_ids"].tolist(), []
    for row, position, target in zip(
        *(batch[key].tolist() for key in ("row", "predicted_from", "target")), strict=True
    ):
        until = None if batch["plan"] is None else batch["plan"].until.tolist()
        seen = [k for k in range(position + 1) if until is None or position < until[k]]
        ways.append((*(ids[row][k] for k in seen), target))
    return ways


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
def test_every_learned_token_is_found_after_its_own_context(layout):
    for examples in forests()[:40]:
        if not any(any(example.learn) for example in examples):
            continue
        batch = laid(examples, layout)
        ways, places = whole_ways(batch), TargetPlaces(batch)
        for example in examples:
            learned = [i for i, times in enumerate(example.learn) if times]
            own = places.of(example)
            assert [ways[place] for place in own if place is not None] == [example.ids[: i + 1] for i in learned]


def test_targets_missing_from_the_batch_have_no_place():
    batch = laid([Example((1, 2, 3, 4), (0, 0, 1, 1), "a:1")], "padded")
    places = TargetPlaces(batch)
    assert places.of(Example((1, 2, 3, 9, 4), (0, 1, 1, 1, 1), "a:2")) == [None, 0, None, None]
    assert places.of(Example((7, 2, 3, 4), (0, 0, 1, 1), "a:3")) == [None, None]
    assert places.of(Example((9, 1, 2, 3, 4), (0, 0, 0, 1, 1), "a:4")) == [None, None], "after one more token"
