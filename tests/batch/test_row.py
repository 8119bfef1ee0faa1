"""Laws of a row, compared with an oracle that follows the parents one by one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atomtune.batch.row import Row, padded_tokens, single
from atomtune.data.records import Example


def example(n: int, prompt: int, origin: str = "train.jsonl:1") -> Example:
    return Example(tuple(range(100, 100 + n)), (0,) * prompt + (1,) * (n - prompt), origin)


def path_of(row: Row, i: int) -> list[int]:
    """The token and all tokens before it on its own path, found by following the parents."""
    path = []
    while i >= 0:
        path.append(i)
        i = row.parent[i]
    return path


#: Two answers after one trunk, written by hand:  0─1─2┬─3─4
#:                                                      └─5
FORK = Row(
    ids=(1, 10, 11, 20, 2, 2),
    parent=(-1, 0, 1, 2, 3, 2),
    until=(6, 6, 6, 5, 5, 6),
    learn=(0, 0, 0, 1, 1, 1),
    origins=("train.jsonl:1", "train.jsonl:2"),
)
ROWS = st.one_of(
    st.integers(2, 12).flatmap(lambda n: st.integers(1, n).map(lambda prompt: single(example(n, prompt)))),
    st.just(FORK),
)
same_every_time = settings(derandomize=True, database=None, deadline=None, max_examples=30)


@same_every_time
@given(ROWS)
def test_a_token_sees_its_own_path_and_nothing_else(row):
    # Catches `until` one too small (a token does not see its end) or too large (a branch sees its neighbour).
    for q in range(len(row)):
        seen = {k for k in range(len(row)) if k <= q < row.until[k]}
        assert seen == set(path_of(row, q))


@same_every_time
@given(ROWS)
def test_the_position_is_the_depth_on_the_own_path(row):
    # Catches positions counted from 1, and indices used as positions (wrong after a fork).
    assert row.positions() == tuple(len(path_of(row, i)) - 1 for i in range(len(row)))


@same_every_time
@given(ROWS)
def test_a_parent_comes_before_its_children(row):
    assert all(parent < i for i, parent in enumerate(row.parent))


@pytest.mark.parametrize("n", [2, 3, 9])
def test_a_single_row_predicts_each_token_from_the_one_before_it(n):
    # Catches a label shift done twice or not at all.
    row = single(example(n, 1))
    assert [(row.ids[i], row.ids[row.parent[i]]) for i in range(1, n)] == [(100 + i, 99 + i) for i in range(1, n)]
    assert row.parent[0] == -1


def test_a_single_row_keeps_the_example():
    one = example(5, 3, "train.jsonl:9")
    row = single(one)
    assert (row.ids, row.learn, row.origins, len(row)) == (one.ids, one.learn, ("train.jsonl:9",), 5)


def test_a_single_row_is_a_chain_and_a_fork_is_not():
    # A fork treated as a chain would get a plain causal mask, and its branches would see each other.
    assert single(example(5, 3)).is_chain
    assert not FORK.is_chain


def test_two_chains_in_one_row_are_not_a_chain():
    row = Row((1, 2, 1, 2), (-1, 0, -1, 2), (2, 2, 4, 4), (0, 1, 0, 1), ("a:1", "a:2"))
    assert not row.is_chain
    assert row.positions() == (0, 1, 0, 1)


@pytest.mark.parametrize("column", ["parent", "until", "learn"])
def test_columns_of_different_lengths_are_rejected(column):
    columns = {"ids": (1, 2, 3), "parent": (-1, 0, 1), "until": (3, 3, 3), "learn": (0, 0, 1)}
    with pytest.raises(AssertionError, match="length"):
        Row(**{**columns, column: columns[column][:-1]}, origins=("a:1",))


def test_padded_tokens_are_the_longest_length_times_the_example_count():
    assert padded_tokens([example(3, 1), example(7, 2), example(5, 4)]) == 21


def test_an_example_with_fewer_learn_marks_than_ids_is_rejected():
    with pytest.raises(ValueError, match=r"train\.jsonl:4.*3 ids.*2 learn"):
        Example((1, 2, 3), (0, 1), "train.jsonl:4")


def test_an_example_that_learns_its_first_token_is_rejected():
    # parent -1 would index the last hidden state of the row.
    with pytest.raises(ValueError, match=r"train\.jsonl:4"):
        Example((1, 2), (1, 1), "train.jsonl:4")
