"""Segment plans: a layer with a state computes a branching row like each record by itself."""

from random import Random

import pytest
import torch

from atomtune.batch.pack import pack
from atomtune.batch.row import Row
from atomtune.batch.segment_plan import plan_paths, plan_segments
from atomtune.batch.tree import graft
from atomtune.data.records import Example


def examples(seed: int, words: int) -> list[Example]:
    """Records over so few words that many share beginnings, also of one token."""
    draw = Random(seed)
    ids = {tuple(draw.randrange(words) for _ in range(draw.randint(2, 14))) for _ in range(draw.randint(1, 9))}
    return [Example(i, (0,) + (1,) * (len(i) - 1), "x") for i in sorted(ids)]


def paths_of(row: Row) -> list[list[int]]:
    """For each token, the indices from its root to itself."""
    paths: list[list[int]] = []
    for i, parent in enumerate(row.parent):
        paths.append([*(paths[parent] if parent >= 0 else []), i])
    return paths


rows = [graft(examples(seed, words), least_saved=1) for seed in range(40) for words in (2, 3, 5)]
rows += [pack(examples(1, 5)), graft([Example((1, 2, 3), (0, 1, 1), "x")])]


@pytest.mark.parametrize("row", rows)
def test_forked_states_have_seen_exactly_each_tokens_path(row):
    # The "layer" lists the tokens seen so far; that list is its state.
    plan = plan_segments(row)
    states, results = [], []
    for batch in plan.batches:
        assert not batch.parents or len(batch.parents) == len(batch.tokens)
        started = [list(states[b][i]) for b, i in batch.parents] or [[] for _ in batch.tokens]
        seen_at, ends = [], []
        for state, tokens in zip(started, batch.tokens.tolist(), strict=True):
            for token in tokens:
                state.append(token)
                seen_at.append(list(state))
            ends.append(state)
        states.append(ends)
        results += [seen_at[place] for place in batch.places.tolist()]
    assert [results[place] for place in plan.order.tolist()] == paths_of(row)


@pytest.mark.parametrize("row", rows)
def test_first_on_points_to_each_tokens_place_on_its_path(row):
    plan = plan_paths(row)
    longest = plan.paths.shape[1]
    for token, place in enumerate(plan.first_on.tolist()):
        path, at = divmod(place, longest)
        assert plan.paths[path, : at + 1].tolist() == paths_of(row)[token]
        assert token not in plan.paths[:path], "it is on an earlier path too"


def test_segments_that_others_continue_from_are_not_padded():
    for row in rows:
        plan = plan_segments(row)
        for number, batch in enumerate(plan.batches):
            is_parent = any(number == b for other in plan.batches for b, _ in other.parents)
            width = batch.tokens.shape[1]
            last_places = {i * width + width - 1 for i in range(len(batch.tokens))}
            assert not is_parent or last_places <= set(batch.places.tolist())


def test_a_segment_that_starts_from_a_state_has_two_tokens_or_more():
    # With one token and a state, a mixer switches to its decoding code, which changes the state in place.
    branches_of_one_token = graft([Example((1, 2, 3, word), (0, 0, 0, 1), "x") for word in range(4)], least_saved=1)
    for row in [*rows, branches_of_one_token]:
        assert all(batch.tokens.shape[1] >= 2 for batch in plan_segments(row).batches if batch.parents)


@pytest.mark.parametrize("shared", [50, 1])
def test_a_shared_beginning_is_computed_once(shared):
    ids = [(*range(shared), 60 + i, 70 + i) for i in range(5)]
    row = graft([Example(i, (0,) * (len(i) - 1) + (1,), "x") for i in ids], least_saved=1)
    plan = plan_segments(row)
    assert [tuple(batch.tokens.shape) for batch in plan.batches] == [(1, shared), (5, 2)]
    assert torch.equal(plan.order.sort().values, torch.arange(len(row)))


def test_only_leaves_of_similar_length_share_a_batch():
    lengths = [226, 4, 200, 20, 150, 225, 21]
    row = pack([Example(tuple(range(length)), (0,) + (1,) * (length - 1), "x") for length in lengths])
    plan = plan_segments(row)
    # 20 is 4 + 16, and 225 is 1.5 * 150.
    assert [tuple(batch.tokens.shape) for batch in plan.batches] == [(2, 20), (1, 21), (3, 225), (1, 226)]
