"""Laws of the split: similar records stay on one side, the count is met as far as that allows, the seed decides."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atomtune.analysis.holdout import alike, overlapping
from atomtune.analysis.holdout import held_out as split
from atomtune.data.records import Record, Turn
from tests.analysis.reading import texts_of

groupings = st.lists(st.integers(0, 30), min_size=2, max_size=120).map(numpy.array)
same_every_time = settings(derandomize=True, database=None, deadline=None)


def record(asked: str, answer: str, task: str = "") -> Record:
    return Record((Turn("user", task, asked) if task else Turn("user", asked), Turn("assistant", answer)), "a:1")


def together(*records: Record) -> list[list[int]]:
    """The rows of each group with more than one record."""
    groups = alike(texts_of(records)).tolist()
    return [rows for one in sorted(set(groups)) if len(rows := [i for i, g in enumerate(groups) if g == one]) > 1]


def of_one_file(groups, count: int, *, seed: int, is_asked_for: bool = False) -> tuple[list[int], list[int]]:
    files = numpy.zeros(len(groups), dtype=numpy.int64)
    learned, held, _ = split(groups, files, [count], is_asked_for=is_asked_for, seed=seed)
    return learned, held


@same_every_time
@given(groups=groupings, share=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_split_keeps_groups_together_and_loses_no_row(groups, share, seed):
    learned, held = of_one_file(groups, max(1, int(share * len(groups))), seed=seed)
    assert sorted([*learned, *held]) == list(range(len(groups)))
    assert (learned, held) == (sorted(learned), sorted(held))
    assert not set(groups[learned].tolist()) & set(groups[held].tolist())
    assert held


@same_every_time
@given(groups=groupings, share=st.floats(0.05, 0.95), seed=st.integers(0, 5))
def test_holdout_size_is_off_by_less_than_one_group(groups, share, seed):
    count = max(1, int(share * len(groups)))
    _, held = of_one_file(groups, count, seed=seed)
    largest = numpy.bincount(groups).max()
    assert abs(len(held) - count) < largest or len(held) == largest


def test_dissimilar_rows_are_held_out_in_the_exact_count():
    groups = numpy.arange(1000)
    learned, held = of_one_file(groups, 100, seed=1)
    assert (len(learned), len(held)) == (900, 100)
    assert of_one_file(groups, 100, seed=1) == (learned, held) != of_one_file(groups, 100, seed=2)


@pytest.mark.parametrize(
    ("is_asked_for", "count", "held_out"),
    [(False, 100, 10), (True, 100, 50), (True, 20, 20)],  # a tenth of the hundred that differ; half of them at most
)
def test_records_that_differ_are_not_all_held_out_beside_a_large_group_of_alike_ones(is_asked_for, count, held_out):
    # Catches a quota that is filled from the few other records, of which none would be left to learn.
    groups = numpy.array([0] * 900 + list(range(900, 1000)))
    files = numpy.zeros(1000, dtype=numpy.int64)
    learned, held, wanted = split(groups, files, [count], is_asked_for=is_asked_for, seed=1)
    assert len(held) == wanted == held_out and min(held) >= 900
    assert set(range(900)) < set(learned)


def test_if_no_group_fits_the_smallest_one_is_held_out():
    groups = numpy.repeat(numpy.arange(30), [20] * 7 + [17] + [20] * 22)
    files = numpy.zeros(len(groups), dtype=numpy.int64)
    for seed in range(3):
        _, held, wanted = split(groups, files, [16], is_asked_for=False, seed=seed)
        assert set(groups[held].tolist()) == {7}
        assert wanted == 16, "one group more than was wanted is no reason to hold out none"
    # The smallest group has a row of the second file, of which none may be held out.
    groups, files = numpy.array([0, 0, 0, 1, 1, 1, 1]), numpy.array([0, 0, 1, 0, 0, 0, 0])
    assert split(groups, files, [1, 0], is_asked_for=False, seed=1).held_out == [3, 4, 5, 6]


@same_every_time
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), min_size=6, max_size=120),
    quotas=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 5),
)
def test_each_file_keeps_its_quota_and_one_with_quota_0_is_learned_whole(rows, quotas, seed):
    groups, files = numpy.array([group for group, _ in rows]), numpy.array([file for _, file in rows])
    learned, held, wanted = split(groups, files, [*quotas, 0], is_asked_for=False, seed=seed)
    assert sorted([*learned, *held]) == list(range(len(rows)))
    assert not set(groups[learned].tolist()) & set(groups[held].tolist())
    assert not (files[held] == 2).any()
    smallest = len(set(groups[held].tolist())) <= 1  # a group that exceeds the quotas, if no other fits
    within = numpy.bincount(files[held], minlength=3) <= numpy.array([*quotas, 0])
    assert within.all() or smallest
    assert len(held) <= wanted or smallest


def test_equal_prompts_and_near_equal_records_stay_together():
    # Catches a split by whole records, which would put the same question into training and into the held-out records.
    rows = [
        record("你是谁？", "家父是大理寺少卿甄远道。"),
        record("今天天气怎么样？", "有雾，看不见对岸。"),
        record("你是谁？", "灯塔的看守人。"),
        record("请用一句话介绍你住的地方，越短越好。", "一座小岛，三间屋子，许多海鸥，还有一盏灯。"),
        record("请用一句话介绍你住的地方，越短越好!", "一座小岛，三间屋子，许多海鸥，还有一盏灯。"),
    ]
    assert together(*rows) == [[0, 2], [3, 4]]


def test_a_task_prompt_shared_by_all_records_does_not_group_them():
    style = "请模仿下面案例中人物的说话风格和语气来回答用户的问题。要求：口语化，古雅含蓄，不说现代词语。" * 3
    questions = [f"{word}是什么？" for word in "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏"]
    assert together(*(record(one, f"答{one}。", style) for one in questions)) == [], "as instruction above an input"
    assert together(*(record(f"{style}{one}", f"答{one}。") for one in questions)) == [], "in one text"


def test_evaluation_records_similar_to_training_records_are_found():
    assert overlapping(numpy.array([0, 1, 1, 0, 4, 1]), learned=3) == [0, 2]
    assert overlapping(numpy.array([0, 1, 2, 3]), learned=2) == []
