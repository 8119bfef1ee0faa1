"""Near duplicates: the groups of nearly equal texts are the same as if every pair were compared with Python's sets."""

import itertools
import random
import unicodedata
from functools import partial
from pathlib import Path

import numpy
import pytest

from atomtune.analysis import near_duplicates
from atomtune.analysis.near_duplicates import _proposed, equal_groups, folded, joined, near_groups
from atomtune.disk import disk_failed

ALPHABET = "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可"


def shingles(text: str) -> set[str]:
    kept = [c for c in unicodedata.normalize("NFKC", text).casefold() if unicodedata.category(c)[0] not in "ZPC"]
    marked = f"<{''.join(kept)}>>"
    return {marked[i : i + 3] for i in range(len(marked) - 2)}


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def components(count: int, pairs: list[tuple[int, int]]) -> list[int]:
    """For each node the first node of its connected component, found by following edges."""
    near: dict[int, set[int]] = {i: set() for i in range(count)}
    for a, b in pairs:
        near[a].add(b)
        near[b].add(a)
    first = [-1] * count
    for start in range(count):
        waiting = [start] if first[start] < 0 else []
        while waiting:
            if first[at := waiting.pop()] < 0:
                first[at] = start
                waiting += near[at]
    return first


def varied(draw: random.Random, texts: int, families: int) -> list[str]:
    """Texts of which many are copies of another with a few characters changed, removed or added."""
    made = ["".join(draw.choices(ALPHABET, k=draw.randint(8, 90))) for _ in range(families)]
    while len(made) < texts:
        text = list(draw.choice(made[:families]))
        for _ in range(draw.randint(0, 4)):
            at = draw.randrange(len(text))
            text[at : at + draw.randint(0, 1)] = draw.choices(ALPHABET, k=draw.randint(0, 2))
        made.append("".join(text))
    draw.shuffle(made)
    return made


@pytest.mark.parametrize("seed", range(2))
def test_groups_match_a_comparison_of_all_pairs(seed):
    texts = varied(random.Random(seed), 250, 60)
    pairs = [(i, j) for i, j in itertools.combinations(range(250), 2) if jaccard(texts[i], texts[j]) >= 0.8]
    assert len(pairs) > 60
    # A pair exactly at 0.8 is proposed in 998 of 1,000 cases; with these seeds all such pairs are proposed.
    assert near_groups(texts).tolist() == components(250, pairs)


def test_a_large_bucket_is_grouped_without_comparing_all_pairs():
    # Many equal texts fall into one bucket. All must be found, and a text that only shares their beginning must not.
    texts = ["同一句话，说了很多很多遍。"] * 50_000 + ["同一句话，说了很多很多遍，后来就再也没有人说了。"]
    groups = near_groups(texts)
    assert groups[:-1].tolist() == [0] * 50_000
    assert groups[-1] == 50_000


def test_a_text_is_compared_with_the_first_of_its_bucket_and_the_eight_before_it():
    keys = numpy.array([3, 8, 3, 5, *[8] * 11])
    pairs = {pair for left, right in _proposed(keys) for pair in zip(left.tolist(), right.tolist(), strict=True)}
    large = [1, *range(4, 15)]
    of_large = {(a, b) for at, b in enumerate(large) for a in {large[0], *large[max(0, at - 8) : at]} if a != b}
    assert pairs == {(0, 2)} | of_large


def test_shingles_common_to_half_of_the_texts_still_count():
    # Every shingle here occurs in half of the texts.
    assert near_groups(["甲乙丙丁戊己庚"] * 150 + ["子丑寅卯辰巳午"] * 150).tolist() == [0] * 150 + [150] * 150


def test_repetition_within_a_text_does_not_affect_similarity():
    assert near_groups(["哈" * 40, "哈" * 7]).tolist() == [0, 0]


@pytest.mark.parametrize(("one", "other"), [("？！", "。。。"), ("2 + 3", "2 - 3"), ("晚安", "早安"), ("", "x")])
def test_short_texts_are_near_duplicates_only_if_equal(one, other):
    assert near_groups([one, other]).tolist() == [0, 1]


def test_lone_surrogates_and_an_empty_list_are_accepted():
    assert near_groups(["\ud800 ok", "\ud800 ok"]).tolist() == [0, 0]
    assert near_groups([]).tolist() == []


def test_window_size_does_not_change_the_groups(monkeypatch):
    # Catches a shingle that reaches into the next text, and a row numbered from its window's start.
    texts = varied(random.Random(9), 200, 60)
    whole = near_groups(texts).tolist()
    monkeypatch.setattr("atomtune.analysis.near_duplicates._WINDOW", 300)
    assert near_groups(texts).tolist() == whole


# Equally many shingles, and a text that has all shingles of the other.
@pytest.mark.parametrize(
    ("one", "other"), [("甲乙丙丁戊己庚辛壬癸", "甲乙丙丁戊己庚辛壬子"), ("甲乙丙甲乙", "甲乙丙甲乙丁甲乙")]
)
def test_the_threshold_is_measured_exactly(one, other):
    index = jaccard(one, other)
    assert near_groups([one, other], threshold=index).tolist() == [0, 0]
    assert near_groups([one, other], threshold=index + 0.01).tolist() == [0, 1]


def test_joined_gives_the_connected_components_of_both_groupings():
    draw = random.Random(5)
    a, b = ([draw.randrange(60) for _ in range(100)] for _ in range(2))
    pairs = [(i, j) for i, j in itertools.combinations(range(100), 2) if a[i] == a[j] or b[i] == b[j]]
    assert joined(numpy.array(a), numpy.array(b)).tolist() == components(100, pairs)


def test_equal_groups_are_numbered_by_their_first_index():
    assert equal_groups(numpy.array([7, -3, 7, 9, -3])).tolist() == [0, 1, 0, 3, 1]


def test_folding_keeps_symbols_that_mean_something():
    assert folded("Ａ + b,  c！") == "a+bc"


def test_folding_removes_case():
    assert folded("Straße") == folded("STRASSE") == "strasse"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_temporary_disk_is_not_taken_for_a_bug(monkeypatch):
    # numpy reported it as "17 requested and 0 written", without the system's number.
    monkeypatch.setattr(near_duplicates.tempfile, "TemporaryFile", partial(Path("/dev/full").open, "r+b"))
    with pytest.raises(OSError) as caught:
        near_groups([f"{number} is a text of its own" for number in range(1000)])
    assert disk_failed(caught.value)
