"""The length of the common beginning of two sequences is that of a count item by item."""

import itertools

import pytest

from atomtune.shared_prefix import shared_characters, shared_length

TEXTS = ["".join(letters) for length in range(6) for letters in itertools.product("ab", repeat=length)]


def counted(first, second):
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))


def test_shared_prefix_lengths_match_an_item_by_item_count():
    for first, second in itertools.product(TEXTS, repeat=2):
        expected = counted(first, second)
        assert shared_characters(first, second) == expected
        assert shared_length([*map(ord, first)], tuple(map(ord, second))) == expected


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_a_known_common_start_is_counted_without_being_compared(start):
    assert shared_length((1, 2, 3, 4), (1, 2, 3, 5, 6), start=start) == 3
    assert shared_length((1, 2, 3), (9, 9, 9), start=3) == 3
