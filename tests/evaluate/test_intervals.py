"""Laws of the intervals."""

import math

import numpy
from pytest import approx

from atomtune.evaluate.intervals import Bootstrap
from atomtune.evaluate.measures import NATS, judged


def test_the_value_is_the_plain_ratio_and_lies_in_its_interval():
    figure = Bootstrap(4, seed=0).ratio([1.0, 2.0, 3.0, 4.0], [1, 1, 2, 1])
    assert figure.value == approx(10 / 5)
    assert figure.low <= figure.value <= figure.high


def test_the_interval_is_as_wide_as_the_theory_of_means_says():
    # The mean of n equal draws has a standard error of sd / sqrt(n); 95 % lie within 1.96 of them.
    values = numpy.random.default_rng(3).normal(5, 2, size=400)
    figure = Bootstrap(400, seed=1).ratio(values.tolist(), [1] * 400)
    expected = 2 * 1.96 * values.std() / 20
    assert figure.high - figure.low == approx(expected, rel=0.1)  # 1,000 resamples


def test_a_difference_is_taken_record_by_record():
    """Two models that differ by the same amount on every record differ without doubt, however varied the records."""
    ours, theirs = [1.0, 9.0, 30.0], [2.0, 10.0, 31.0]
    draws = Bootstrap(3, seed=0)
    figure = draws.difference((ours, [1] * 3), (theirs, [1] * 3))
    assert figure.as_list() == approx([-1, -1, -1])
    assert draws.ratio(ours, [1] * 3).high > draws.ratio(theirs, [1] * 3).low  # apart, they overlap


def test_nothing_to_divide_by_is_no_figure():
    assert Bootstrap(2, seed=0).ratio([0, 0], [0, 0]) is None


def test_records_without_the_thing_counted_do_not_spoil_the_interval():
    # One record in three calls a tool; draws without it have no share and are left out.
    figure = Bootstrap(3, seed=0).ratio([1, 0, 0], [1, 0, 0])
    assert figure.as_list() == [1.0, 1.0, 1.0]


def test_the_same_seed_gives_the_same_interval():
    one, two = (Bootstrap(5, seed=4).ratio([1, 2, 3, 4, 5], [1] * 5) for _ in range(2))
    assert one == two


def test_one_record_tells_no_two_models_apart():
    # All its draws are equal: an interval of no width said "Better" without a doubt.
    difference = Bootstrap(1, seed=0).difference(([1.0], [1]), ([2.0], [1]))
    assert difference.as_list() == [-1, -math.inf, math.inf]
    alone = Bootstrap(1, seed=0).ratio([2.0], [1])
    assert not alone.has_interval and not alone.exp().has_interval and alone.exp().value == approx(math.exp(2))
    assert judged(NATS, difference) == "unclear"
