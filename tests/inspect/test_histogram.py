"""Lengths: histograms and suggested limits, compared with counting value by value."""

import itertools
import random

import numpy
import pytest

from atomtune.inspect.histogram import STEP, Limit, histogram, limit_at, percentiles, suggested

#: More than the length of any record here.
MOST = 4096


@pytest.mark.parametrize("seed", range(5))
def test_the_suggested_length_is_the_smallest_that_meets_its_limit(seed):
    draw = random.Random(seed)
    longest = numpy.array([draw.randint(1, 200) if draw.random() < 0.98 else 900 for _ in range(draw.randint(1, 500))])
    nothing, little = suggested(longest, most=MOST)

    def longer(tokens: int) -> int:
        return sum(length > tokens for length in longest.tolist())

    for limit in (nothing, little):
        assert limit.tokens % STEP == 0
        assert limit == limit_at(longest, limit.tokens)
        assert limit.records == longer(limit.tokens)
        assert limit.lost == sum(max(0, length - limit.tokens) for length in longest.tolist())
    assert longer(nothing.tokens) == 0 < longer(nothing.tokens - STEP)
    assert longer(little.tokens) < len(longest) / 100 <= longer(little.tokens - STEP)


@pytest.mark.parametrize(("outliers", "tokens"), [(0, 64), (1, 64), (2, 320)])
def test_exactly_one_percent_of_the_records_is_not_under_one_percent(outliers, tokens):
    # One of 101 records is under 1 %; one of 100 is exactly 1 %.
    assert suggested(numpy.array([10] * (101 - outliers) + [300] * outliers), most=MOST)[1].tokens == tokens
    assert suggested(numpy.array([10] * 99 + [300]), most=MOST)[1].tokens == 320


@pytest.mark.parametrize("seed", range(8))
def test_a_histogram_counts_everything_once(seed):
    draw = random.Random(seed)
    values = [int(draw.expovariate(1 / draw.choice([3, 80, 5000]))) for _ in range(draw.randint(1, 800))]
    bars = histogram(numpy.array(values))
    assert 1 <= len(bars) <= 14
    assert bars[0].low == 0
    assert all(one.high + 1 == other.low for one, other in itertools.pairwise(bars))
    assert [bar.count for bar in bars] == [sum(bar.low <= value <= bar.high for value in values) for bar in bars]
    assert sum(bar.count for bar in bars) == len(values) and bars[-1].count
    assert str(bars[0].high + 1).rstrip("0") in ("1", "2", "5") or len(bars) == 1, "a round width"
    # All bars have the same width, except that the last one may take in a few values that are far longer.
    widths = {bar.high - bar.low for bar in bars}
    assert len({bar.high - bar.low for bar in bars[:-1]}) <= 1
    assert len(widths) == 1 or bars[-1].count <= len(values) / 100


def test_percentiles_are_values_that_occur():
    assert percentiles(numpy.array([9, 1, 1, 1])) == {"median": 1, "90 %": 9, "99 %": 9, "longest": 9}
    assert percentiles(numpy.arange(200, 0, -1)) == {"median": 100, "90 %": 180, "99 %": 198, "longest": 200}


def test_a_limit_costs_what_the_longer_records_have_beyond_it():
    assert limit_at(numpy.array([10, 64, 65, 100]), 64) == Limit(64, records=2, lost=37)


def test_no_suggested_length_exceeds_the_bases_limit():
    assert [limit.tokens for limit in suggested(numpy.array([10] * 99 + [240_000]), most=512)] == [512, 512]
    assert [limit.tokens for limit in suggested(numpy.array([10] * 199 + [240_000]), most=512)] == [512, 64]
