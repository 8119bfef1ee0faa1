"""Laws of rows with shared beginnings, compared with an oracle that follows the parents one by one."""

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atomtune.batch.attention_plan import visible
from atomtune.batch.pack import pack
from atomtune.batch.row import Row, segments
from atomtune.batch.tree import LEAST_SAVED, graft
from atomtune.data.records import Example
from tests.batch.test_row import path_of

Layout = Callable[[list[Example]], Row]
everything_shared = partial(graft, least_saved=1)
LAYOUTS: dict[str, Layout] = {"tree": everything_shared, "frugal": partial(graft, least_saved=4), "packed": pack}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def forest(seed: int, *, longest: int = 14) -> list[Example]:
    """Random records over two to four words. Most begin with a piece of another: trunks and nested forks."""
    draw = Random(seed)
    words, examples = draw.randint(2, 4), []
    for n in range(1, draw.randint(1, 9) + 1):
        known = draw.choice(examples).ids if examples and draw.random() < 0.7 else ()
        tail = tuple(draw.randrange(words) for _ in range(draw.randint(0 if known else 1, longest // 2)))
        ids = (known[: draw.randint(0, len(known))] + tail)[:longest] or (0,)
        learn = (0, *draw.choices((0, 1, 1, 2), k=len(ids) - 1))
        examples.append(Example(ids, learn, f"train.jsonl:{n}"))
    return examples


@cache
def forests() -> list[list[Example]]:
    return [forest(seed) for seed in range(2_000)]


def ids_on(row: Row, i: int) -> tuple[int, ...]:
    """The ids on the path to token i, including i."""
    return tuple(row.ids[k] for k in reversed(path_of(row, i)))


def told_by_parents(row: Row, window: int | None = None) -> torch.Tensor:
    """[T, T], the oracle: q sees the last `window` tokens of its path, found from the parents."""
    seen = torch.zeros(len(row), len(row), dtype=torch.bool)
    for q in range(len(row)):
        seen[q, path_of(row, q)[:window]] = True
    return seen


def told_by_law(row: Row, window: int | None = None) -> torch.Tensor:
    return visible(torch.tensor(row.until), torch.tensor(row.positions()), window=window)


def targets_of_records(examples: list[Example]) -> Counter:
    """How often each target is learned; a target is identified by all tokens before it and itself."""
    counted: Counter = Counter()
    for example in examples:
        for i, times in enumerate(example.learn):
            if times:
                counted[example.ids[: i + 1]] += times
    return counted


def targets_of_row(row: Row) -> Counter:
    counted: Counter = Counter()
    for i, times in enumerate(row.learn):
        if times:
            assert row.parent[i] >= 0, "nothing stands before this target"
            counted[ids_on(row, i)] += times
    return counted


def assert_lawful(row: Row, examples: list[Example]) -> None:
    """Check all laws that hold in every layout."""
    assert torch.equal(told_by_law(row), told_by_parents(row))
    assert torch.equal(told_by_law(row, 3), told_by_parents(row, 3))
    assert row.positions() == tuple(len(path_of(row, i)) - 1 for i in range(len(row)))
    paths = {ids_on(row, i) for i in range(len(row))}
    assert paths == {e.ids[: i + 1] for e in examples for i in range(len(e.ids))}
    assert targets_of_row(row) == targets_of_records(examples)
    assert sum(row.learn) == sum(sum(e.learn) for e in examples)
    assert sorted(row.origins) == sorted(e.origin for e in examples)


@every_layout
def test_a_token_sees_its_ancestors_and_itself(layout):
    # Catches `until` off by one, branches that see siblings, and records of a packed row that see each other.
    for examples in forests():
        row = layout(examples)
        assert torch.equal(told_by_law(row), told_by_parents(row)), examples


@every_layout
@pytest.mark.parametrize("window", [1, 2, 5])
def test_an_attention_window_is_counted_along_the_path(layout, window):
    # Catches a window over indices of the row (a late branch would lose its trunk), and a window off by one.
    for examples in forests()[:500]:
        row = layout(examples)
        assert torch.equal(told_by_law(row, window), told_by_parents(row, window)), examples


@every_layout
def test_the_paths_of_a_row_are_exactly_its_records(layout):
    # Catches lost or added tokens, and tokens on the wrong branch. Positions are depths on these paths.
    for examples in forests():
        row = layout(examples)
        assert all(parent < i for i, parent in enumerate(row.parent))
        assert row.positions() == tuple(len(path_of(row, i)) - 1 for i in range(len(row)))
        leaves = [i for i in range(len(row)) if i not in set(row.parent)]
        read = [ids_on(row, i) for i in leaves]
        told = {e.ids for e in examples}
        assert set(read) <= told
        assert told <= {ids_on(row, i) for i in range(len(row))}


@every_layout
def test_a_targets_weight_is_how_often_the_records_learn_it(layout):
    # Catches a shared target that counts once, and a learn mark that moves to another record's token.
    for examples in forests():
        assert targets_of_row(layout(examples)) == targets_of_records(examples), examples


def test_full_sharing_keeps_each_distinct_beginning_once():
    # A tree has one token per beginning that occurs; two siblings with the same token would be one beginning twice.
    for examples in forests():
        row = everything_shared(examples)
        beginnings = {e.ids[:end] for e in examples for end in range(1, len(e.ids) + 1)}
        assert len(row) == len(beginnings)
        assert len(set(zip(row.parent, row.ids, strict=True))) == len(row), "two siblings begin alike"


def test_packing_keeps_every_record_whole_and_in_its_place():
    for examples in forests()[:500]:
        row = pack(examples)
        assert row.ids == tuple(token for e in examples for token in e.ids)
        assert row.learn == tuple(times for e in examples for times in e.learn)
        assert [i for i, parent in enumerate(row.parent) if parent < 0] == [
            sum(len(e.ids) for e in examples[:n]) for n in range(len(examples))
        ]


def stretches(row: Row) -> list[tuple[int, int]]:
    """(records, tokens) of each span shared by the same records, in a row whose targets each record learns once."""
    children: dict[int, list[int]] = {}
    for i, parent in enumerate(row.parent):
        children.setdefault(parent, []).append(i)
    # If each record learns a token once, its count is the number of records through it. The first token is no target.
    through = [times or sum(row.learn[k] for k in children.get(i, ())) for i, times in enumerate(row.learn)]
    begun: list[int] = []
    length: Counter = Counter()
    for i, parent in enumerate(row.parent):
        same = parent >= 0 and through[parent] == through[i]
        begun.append(begun[parent] if same else i)
        length[begun[i]] += 1
    return [(through[i], tokens) for i, tokens in length.items()]


@pytest.mark.parametrize("least_saved", [2, 7, LEAST_SAVED])
def test_a_trunk_is_shared_only_if_it_saves_enough_tokens(least_saved):
    # Catches counting shared tokens instead of saved tokens, and a trunk dropped together with the branches that pay.
    shared = 0
    for seed in range(300):
        examples = [
            Example((3, *e.ids), (0, *[1] * len(e.ids)), e.origin) for e in forest(seed, longest=40) if len(e.ids) > 1
        ]
        if not examples:
            continue
        row = graft(examples, least_saved=least_saved)
        saved = [(records - 1) * tokens for records, tokens in stretches(row) if records > 1]
        assert all(tokens >= least_saved for tokens in saved), examples
        assert len(row) + sum(saved) == len(pack(examples))
        assert len(everything_shared(examples)) <= len(row) <= len(pack(examples))
        assert_lawful(row, examples)
        shared += len(saved)
    assert shared > 100, "the records share too little to show anything"


@pytest.mark.parametrize(("records", "trunk", "shared"), [(2, 15, False), (2, 16, True), (5, 3, False), (5, 4, True)])
def test_minimum_length_of_a_shared_trunk(records, trunk, shared):
    examples = [Example((*range(trunk), 90 + n, 1), (0,) * (trunk + 1) + (1,), f"a:{n}") for n in range(records)]
    assert len(graft(examples)) == (trunk if shared else records * trunk) + 2 * records


def test_short_leaves_come_before_long_ones_and_branches_that_fork_again_last():
    # Neighbouring chunks of attention then have similar sizes.
    trunk, branch = tuple(range(20)), tuple(range(30, 50))
    ends = [(60,) * 30, (61,) * 3, (*branch, 70), (62,) * 6, (*branch, 71, 72)]
    row = graft([Example((*trunk, *end), (0,) * (20 + len(end)), f"a:{n}") for n, end in enumerate(ends)])
    assert [len(part) for part in segments(row)] == [20, 3, 6, 30, 20, 1, 2]


# Unusual batches.

WORDS = st.integers(0, 3)
MARK = st.integers(0, 1)


@st.composite
def records(draw: st.DrawFn, texts: st.SearchStrategy[list[list[int]]]) -> list[Example]:
    """Records with these texts and random learn marks."""
    made = []
    for n, ids in enumerate(draw(texts), start=1):
        learn = [0, *draw(st.lists(MARK, min_size=len(ids) - 1, max_size=len(ids) - 1))] if ids else []
        made.append(Example(tuple(ids), tuple(learn), f"train.jsonl:{n}"))
    return made


text = st.lists(WORDS, min_size=1, max_size=8)
ODD = {
    "one record": st.tuples(text).map(list),
    "one record many times": st.tuples(text, st.integers(2, 6)).map(lambda some: [some[0]] * some[1]),
    "each the beginning of the next": text.map(lambda ids: [ids[: n + 1] for n in range(len(ids))]),
    "single tokens": st.lists(st.tuples(WORDS).map(list), min_size=1, max_size=6),
    "some with nothing in them": st.lists(st.lists(WORDS, max_size=3), min_size=1, max_size=5).filter(any),
    "one prompt": st.tuples(text, st.lists(text, min_size=2, max_size=5)).map(
        lambda some: [some[0] + answer for answer in some[1]]
    ),
    "prompts that differ in the last token": st.tuples(text, text, st.permutations(range(4))).map(
        lambda some: [[*some[0], last, *some[1]] for last in some[2]]
    ),
}


@every_layout
@pytest.mark.parametrize("kind", ODD)
def test_unusual_batches_satisfy_every_row_invariant(layout, kind):
    @settings(derandomize=True, database=None, deadline=None, max_examples=30)
    @given(records(ODD[kind]))
    def obeys(examples):
        assert_lawful(layout(examples), examples)

    obeys()


def test_a_thousand_nested_prefixes_share_one_chain():
    # Catches recursion by depth, and cubic cost.
    examples = [Example((0,) * n, (0,) + (1,) * (n - 1), f"a:{n}") for n in range(1, 1_001)]
    row = everything_shared(examples)
    assert row.is_chain
    assert row.learn == (0, *range(999, 0, -1))


def test_equal_records_share_one_chain_whose_targets_count_twice():
    one = Example((1, 2, 3), (0, 1, 1), "a:1")
    row = everything_shared([one, one])
    assert (row.ids, row.learn, row.origins) == ((1, 2, 3), (0, 2, 2), ("a:1", "a:1"))


def test_records_share_a_beginning_without_being_adjacent():
    # Catches sharing only between neighbours in the batch.
    ids = [(1, 2, 3), (7, 8), (1, 2, 4), (7, 9)]
    row = everything_shared([Example(one, (0,) * len(one), f"a:{n}") for n, one in enumerate(ids)])
    assert Counter(row.ids) == Counter((1, 2, 3, 4, 7, 8, 9))
