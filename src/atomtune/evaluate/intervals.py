"""Intervals: how far a figure may depend on which records were asked.

A share of answers (exact match, stop rate, …) gets Wilson's score interval, and a difference of two such shares
that of Bonett and Price. All other figures get a bootstrap: records are drawn again with replacement.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

RESAMPLES = 1000
#: The middle 95 % of the resampled figures.
LOW, HIGH = 2.5, 97.5
#: 95 % of a normal distribution lie within this many standard deviations of its mean.
Z = 1.959964

#: One model's numerators and denominators, one of each per record.
Columns = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval; of a single record the interval has no ends."""

    value: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """Whether there was more than one record."""
        return self.low != -math.inf

    def as_list(self) -> list[float]:
        return [self.value, self.low, self.high]

    def exp(self) -> "Figure":
        """Nats to perplexity."""
        with numpy.errstate(over="ignore"):
            value, low, high = (float(numpy.exp(nats)) for nats in self.as_list())
        return Figure(value, low if self.has_interval else -math.inf, high)


def share(right: Sequence[float], answers: Sequence[float]) -> Figure | None:
    """The share of answers that are right, with Wilson's score interval; None where there are no answers.

    right    right answers of each record
    answers  all answers of each record; 0 where the record has none
    The bootstrap fails for shares near 0 and 1. If the answers of 5 records are all right, those of every resample are
    too, and its interval is 100–100 %; Wilson's is 57–100 %. Of a model that answers 95 % right, the bootstrap over 5
    records contains the 95 % in 23 % of samples, Wilson's interval in 98 % (tests/evaluate/test_intervals.py).

    Answers of one record are not independent, so Wilson's n is the effective number of answers.
    Sources: E. B. Wilson, JASA 22 (1927), 209-212; with an effective n: C. Franco et al., Journal of Survey
    Statistics and Methodology 7 (2019), 334-364.
    """
    counted, total = _columns(right, answers)
    if not total.sum():
        return None
    value = float(counted.sum() / total.sum())
    if len(total) == 1:
        return _without_interval(value)
    n = _effective_answers(counted, total)
    centre = (value + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(value * (1 - value) / n + Z**2 / (4 * n**2))
    # Rounding may put an end at -1e-17, or just inside the value it should be equal to.
    return Figure(value, max(0.0, min(centre - half, value)), min(1.0, max(centre + half, value)))


def _effective_answers(right: numpy.ndarray, answers: numpy.ndarray) -> float:
    """How many independent answers say as much about the share as these, which come in groups, one per record.

    It is the n for which p (1 - p) / n equals the variance of the share, estimated from how much records differ.
    At most it is the number of answers, as if all were independent. At least it is Kish's number, as if the answers of
    a record were always equal; for records of the same size that is the number of records. If all answers are right,
    or all wrong, the variance cannot be estimated, and Kish's number is taken. With one answer per record, all of these
    are the number of records.
    """
    total = answers.sum()
    kish = float(total**2 / (answers**2).sum())
    share_right = right.sum() / total
    records = numpy.count_nonzero(answers)
    if share_right in (0, 1) or records == 1:
        return kish
    residuals = right - share_right * answers
    variance = (residuals**2).sum() / total**2 * records / (records - 1)
    if not variance:
        return float(total)
    return float(min(max(share_right * (1 - share_right) / variance, kish), total))


def share_difference(ours: Columns, theirs: Columns) -> Figure | None:
    """Our share of right answers less theirs, on the same records; None where a model has no answers.

    The interval is that of Bonett and Price: two records are added, one that only we have right and one that only they
    have right, and the mean of the records' differences is taken as normally distributed. The paired bootstrap fails
    here as it does for one share: 0 of 2 right before and 2 of 2 after give the interval 100–100 %, so "better".
    With one answer per record this is their formula; with several, each record's difference counts by its answers.
    Source: D. G. Bonett and R. M. Price, Journal of Educational and Behavioral Statistics 37 (2012), 479-488;
    recommended by M. W. Fagerland et al., Statistics in Medicine 33 (2014), 2850-2875.
    """
    our_right, our_answers = _columns(*ours)
    their_right, their_answers = _columns(*theirs)
    if not our_answers.sum() or not their_answers.sum():
        return None
    value = float(our_right.sum() / our_answers.sum() - their_right.sum() / their_answers.sum())
    if len(our_answers) == 1:
        return _without_interval(value)
    our_share, our_residuals = _with_two_records(our_right, our_answers, first_is_right=True)
    their_share, their_residuals = _with_two_records(their_right, their_answers, first_is_right=False)
    error = math.sqrt(((our_residuals - their_residuals) ** 2).sum())
    centre = our_share - their_share
    return Figure(value, max(-1.0, min(centre - Z * error, value)), min(1.0, max(centre + Z * error, value)))


def _with_two_records(
    right: numpy.ndarray, answers: numpy.ndarray, *, first_is_right: bool
) -> tuple[float, numpy.ndarray]:
    """A share after two records of average size were added, one all right and one all wrong; and what each record adds.

    The residuals [n + 2] are by how much each record moves the share; they sum up to 0.
    """
    size = answers.sum() / numpy.count_nonzero(answers)
    right = numpy.append(right, [size, 0.0] if first_is_right else [0.0, size])
    answers = numpy.append(answers, [size, size])
    value = float(right.sum() / answers.sum())
    return value, (right - value * answers) / answers.sum()


def _columns(*columns: Sequence[float]) -> list[numpy.ndarray]:
    return [numpy.asarray(column, dtype=float) for column in columns]


def _without_interval(value: float) -> Figure:
    """A figure of one record: nothing is known of how records differ."""
    return Figure(value, -math.inf, math.inf)


class Bootstrap:
    """Resamples of the records, the same for every figure and model, so that differences are taken record by record."""

    def __init__(self, records: int, *, seed: int) -> None:
        self.records = records
        generator = numpy.random.default_rng(seed)
        # How often each record is drawn in each resample   [R, n]
        self.times = generator.multinomial(records, numpy.full(records, 1 / records), size=RESAMPLES)

    def ratio(self, numerators: Sequence[float], denominators: Sequence[float]) -> Figure | None:
        """sum(numerators) / sum(denominators), for example nats per token; None where the denominators are all 0."""
        value, resampled = self._ratios(numerators, denominators)
        return None if value is None else self._figure(value, resampled)

    def difference(self, ours: Columns, theirs: Columns) -> Figure | None:
        """Our ratio less theirs, over the same resamples."""
        our_value, our_resampled = self._ratios(*ours)
        their_value, their_resampled = self._ratios(*theirs)
        if our_value is None or their_value is None:
            return None
        return self._figure(our_value - their_value, our_resampled - their_resampled)

    def _figure(self, value: float, resampled: numpy.ndarray) -> Figure:
        """The value with its interval; one record alone has none, as every resample is that record again."""
        if self.records == 1:
            return _without_interval(value)
        possible = resampled[~numpy.isnan(resampled)]  # a resample may hold only records whose denominator is 0
        low, high = numpy.percentile(possible, [LOW, HIGH]) if len(possible) else (value, value)
        return Figure(value, float(low), float(high))

    def _ratios(self, numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float | None, numpy.ndarray]:
        above, below = _columns(numerators, denominators)
        if not below.sum():
            return None, numpy.empty(0)
        with numpy.errstate(invalid="ignore", divide="ignore"):
            return float(above.sum() / below.sum()), (self.times @ above) / (self.times @ below)
