"""Intervals: laws of the figures, differences and shares, and of their 95 % intervals."""

import itertools
import math

import numpy
import pytest
from pytest import approx

from atomtune.evaluate.intervals import Bootstrap, share, share_difference
from atomtune.evaluate.likelihood import TargetScores
from atomtune.evaluate.metrics import (
    METRICS,
    NATS,
    AnswerResult,
    RecordResult,
    differences,
    figures_of,
    judged,
)


def test_the_value_is_the_plain_ratio_and_lies_in_its_interval():
    figure = Bootstrap(4, seed=0).ratio([1.0, 2.0, 3.0, 4.0], [1, 1, 2, 1])
    assert figure.value == approx(10 / 5)
    assert figure.low <= figure.value <= figure.high


def test_the_interval_width_matches_the_standard_error_of_the_mean():
    # The mean of n independent draws has the standard error sd / sqrt(n); 95 % of means lie within 1.96 of these.
    values = numpy.random.default_rng(3).normal(5, 2, size=400)
    figure = Bootstrap(400, seed=1).ratio(values.tolist(), [1] * 400)
    expected = 2 * 1.96 * values.std() / 20
    assert figure.high - figure.low == approx(expected, rel=0.1)  # 1,000 resamples


def test_the_difference_of_two_models_is_paired_by_record():
    """Two models that differ by the same amount on every record differ surely, however varied the records are."""
    ours, theirs = [1.0, 9.0, 30.0], [2.0, 10.0, 31.0]
    draws = Bootstrap(3, seed=0)
    figure = draws.difference((ours, [1] * 3), (theirs, [1] * 3))
    assert figure.as_list() == approx([-1, -1, -1])
    assert draws.ratio(ours, [1] * 3).high > draws.ratio(theirs, [1] * 3).low  # the separate intervals overlap


def test_a_ratio_with_a_zero_denominator_gives_no_figure():
    assert Bootstrap(2, seed=0).ratio([0, 0], [0, 0]) is None


def test_resamples_without_any_answer_are_left_out_of_the_interval():
    # One record in three has an answer; resamples without it have no ratio and are left out.
    figure = Bootstrap(3, seed=0).ratio([1, 0, 0], [1, 0, 0])
    assert figure.as_list() == [1.0, 1.0, 1.0]


def test_the_same_seed_gives_the_same_interval():
    one, two = (Bootstrap(5, seed=4).ratio([1, 2, 3, 4, 5], [1] * 5) for _ in range(2))
    assert one == two


def test_a_difference_on_a_single_record_is_judged_unclear():
    # All resamples are equal. Regression: an interval of width zero gave a sure "Better".
    difference = Bootstrap(1, seed=0).difference(([1.0], [1]), ([2.0], [1]))
    assert difference.as_list() == [-1, -math.inf, math.inf]
    alone = Bootstrap(1, seed=0).ratio([2.0], [1])
    assert not alone.has_interval and not alone.exp().has_interval and alone.exp().value == approx(math.exp(2))
    assert judged(NATS, difference) == "unclear"


def one_each(right: int, wrong: int) -> tuple[list[int], list[int]]:
    """Records of one answer each, as lists of right answers and of answers."""
    return [1] * right + [0] * wrong, [1] * (right + wrong)


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share_matches_newcombes_published_table(right, of, low, high):
    """R. G. Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3: equal to four digits."""
    figure = share(*one_each(right, of - right))
    assert figure.as_list() == approx([right / of, low, high], abs=5e-5)
    mirrored = share(*one_each(of - right, right))
    assert mirrored.as_list() == approx([1 - right / of, 1 - high, 1 - low], abs=5e-5)


def coverage(interval, n: int, truth: float) -> float:
    """Probability that the interval of a sample of n records contains the truth, as an exact sum."""
    total = 0.0
    for right in range(n + 1):
        figure = interval(*one_each(right, n - right))
        if figure.low <= truth <= figure.high:
            total += math.comb(n, right) * truth**right * (1 - truth) ** (n - right)
    return total


def test_the_share_interval_has_95_percent_coverage_unlike_the_bootstrap():
    assert coverage(share, 5, 0.95) == approx(0.977, abs=1e-3)
    assert coverage(Bootstrap(5, seed=0).ratio, 5, 0.95) == approx(0.225, abs=1e-3)
    for n in (5, 10, 30, 100):
        covered = [coverage(share, n, truth) for truth in numpy.linspace(0.02, 0.98, 97)]
        assert numpy.mean(covered) > 0.945
        assert min(covered) > 0.83  # 95 % on average; lowest near 0 and 1, where one answer changes much


def test_identical_answers_within_a_record_count_as_one_observation():
    """A dialogue whose five answers all stop is no more evidence than a dialogue with one answer."""
    for right, wrong in ((4, 0), (3, 1), (0, 4), (2, 2)):
        exact, answers = one_each(right, wrong)
        five_times = share([5 * count for count in exact], [5 * count for count in answers])
        assert five_times.as_list() == approx(share(exact, answers).as_list())


def test_independent_answers_within_a_record_count_as_separate_observations():
    assert share([5] * 4, [10] * 4).as_list() == approx(share(*one_each(20, 20)).as_list())


def test_answers_that_vary_less_than_chance_count_no_more_than_all_of_them():
    varied_less = share([5, 5, 5, 6], [10] * 4)
    assert varied_less.as_list() == approx(share(*one_each(21, 19)).as_list())


def test_the_number_of_answers_that_count_follows_from_how_much_the_records_differ():
    # p = 6/16; the squares of right - 4 p sum up to 5, so the variance of p is 5 / 16^2 * 4/3, and n = p (1 - p) / it.
    p, n, z = 6 / 16, 9.0, 1.959964
    assert p * (1 - p) / (5 / 16**2 * 4 / 3) == approx(n)
    ends = [(p + z**2 / (2 * n) + sign * z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))) for sign in (-1, 1)]
    figure = share([2, 0, 1, 3], [4] * 4)
    assert [figure.low, figure.high] == approx([end / (1 + z**2 / n) for end in ends])
    assert share([2, 0, 1, 3, 0, 0], [4, 4, 4, 4, 0, 0]) == figure, "records without answers count for nothing"


def test_a_record_with_most_of_the_answers_counts_for_little_more_than_one():
    # Wilson's interval of n answers that are all right ends at n / (n + z^2); Kish's n is the sum squared by the
    # sum of squares. Records without answers count for nothing.
    kish = 10**2 / (1**2 + 9**2)
    assert share([1, 9, 0], [1, 9, 0]).low == approx(kish / (kish + 1.959964**2))


def test_records_without_answers_do_not_change_a_difference():
    ours, theirs = ([1, 0, 2, 1], [2, 1, 2, 2]), ([0, 0, 1, 1], [2, 1, 2, 2])
    with_empty = [tuple([*column, 0, 0] for column in columns) for columns in (ours, theirs)]
    assert share_difference(*with_empty).as_list() == approx(share_difference(ours, theirs).as_list())


def test_the_difference_of_shares_matches_the_bonett_price_formula():
    """Their formula uses the counts of records that both models, only one, or neither answered right."""
    for both, only_we, only_they, neither in itertools.product(range(4), repeat=4):
        n = both + only_we + only_they + neither
        if n < 2:
            continue
        ours = [1] * (both + only_we) + [0] * (only_they + neither)
        theirs = [1] * both + [0] * only_we + [1] * only_they + [0] * neither
        p12, p21 = (only_we + 1) / (n + 2), (only_they + 1) / (n + 2)
        half = 1.959964 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / (n + 2))
        expected = [(only_we - only_they) / n, max(p12 - p21 - half, -1), min(p12 - p21 + half, 1)]
        assert share_difference((ours, [1] * n), (theirs, [1] * n)).as_list() == approx(expected)


def test_a_share_lies_in_its_interval_and_both_between_0_and_1():
    generator = numpy.random.default_rng(7)
    for _ in range(300):
        answers = generator.integers(0, 5, size=generator.integers(2, 9))
        answers[0] = 1
        ours, theirs = (generator.binomial(answers, generator.choice([0, 0.1, 0.5, 1])) for _ in range(2))
        figure = share(ours, answers)
        assert 0 <= figure.low <= figure.value <= figure.high <= 1
        assert figure.low < figure.high
        difference = share_difference((ours, answers), (theirs, answers))
        assert -1 <= difference.low <= difference.value <= difference.high <= 1
        assert difference.low < difference.high


def test_shares_of_no_answers_or_of_one_record_have_no_interval():
    assert share([0, 0], [0, 0]) is None
    assert share_difference(([0, 0], [0, 0]), ([1, 0], [1, 1])) is None
    assert not share([1], [1]).has_interval
    assert not share_difference(([1], [1]), ([0], [1])).has_interval


def records(count: int, *, right: bool) -> list[RecordResult]:
    """Records of one answer each, which is right or wrong in all measures."""
    answer = AnswerResult("", 100.0 if right else 0.0, right, right, 4, 4, right, (right, right))
    return [RecordResult(TargetScores(nats=float(row), right=3, tokens=4), (answer,)) for row in range(count)]


def test_a_perfect_share_of_few_records_has_no_interval_of_100_to_100():
    draws = Bootstrap(5, seed=0)
    figures = figures_of(records(5, right=True), draws)
    shares = {metric.name for metric in METRICS if metric.shares_answers}
    assert shares == {"exact_match", "stop_rate", "think_rate", "call_parse_rate", "call_known_rate"}
    for name in shares:
        assert figures[name].as_list() == approx([1, 0.5655, 1], abs=1e-4)
    nats = [float(row) for row in range(5)]
    assert figures["nats_per_token"] == draws.ratio(nats, [4] * 5)  # means of continuous scores still use the bootstrap


def test_a_share_difference_is_unclear_on_two_records_and_clear_on_eight():
    """If two records change from wrong to right, all resamples say better; but two coins can do that by chance."""
    exact = next(metric for metric in METRICS if metric.name == "exact_match")
    verdicts = {}
    for count in (2, 8):
        draws = Bootstrap(count, seed=0)
        changes = differences(records(count, right=True), records(count, right=False), draws)
        verdicts[count] = judged(exact, changes["exact_match"])
    assert verdicts == {2: "unclear", 8: "better"}
