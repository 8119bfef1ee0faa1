"""Intervals: how far a figure may be luck of which records were asked; records are drawn again with putting back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

RESAMPLES = 1000
#: The middle 95 % of the resampled figures.
LOW, HIGH = 2.5, 97.5


@dataclass(frozen=True)
class Figure:
    """A value, and the interval that 95 % of other draws of as many records would give; of one record it is endless."""

    value: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """Whether other records were seen, by which it can be told."""
        return self.low != -math.inf

    def as_list(self) -> list[float]:
        return [self.value, self.low, self.high]

    def exp(self) -> "Figure":
        """Nats to perplexity."""
        with numpy.errstate(over="ignore"):
            value, low, high = (float(numpy.exp(nats)) for nats in self.as_list())
        return Figure(value, low if self.has_interval else -math.inf, high)


class Bootstrap:
    """Draws of records, the same for every figure and model, so that differences are taken record by record."""

    def __init__(self, records: int, *, seed: int) -> None:
        self.records = records
        generator = numpy.random.default_rng(seed)
        # How often each record is drawn in each resample   [R, n]
        self.times = generator.multinomial(records, numpy.full(records, 1 / records), size=RESAMPLES)

    def ratio(self, numerators: Sequence[float], denominators: Sequence[float]) -> Figure | None:
        """sum(numerators) / sum(denominators), as nats by tokens; None where there is nothing to divide by."""
        value, resampled = self._ratios(numerators, denominators)
        return None if value is None else self._figure(value, resampled)

    def difference(
        self,
        ours: tuple[Sequence[float], Sequence[float]],
        theirs: tuple[Sequence[float], Sequence[float]],
    ) -> Figure | None:
        """Our ratio less theirs, over the same draws."""
        our_value, our_draws = self._ratios(*ours)
        their_value, their_draws = self._ratios(*theirs)
        if our_value is None or their_value is None:
            return None
        return self._figure(our_value - their_value, our_draws - their_draws)

    def _figure(self, value: float, resampled: numpy.ndarray) -> Figure:
        """The value with its interval; that of one record alone has no ends: every draw is that record again."""
        if self.records == 1:
            return Figure(value, -math.inf, math.inf)
        possible = resampled[~numpy.isnan(resampled)]  # a draw of records without a tool call has no share of calls
        low, high = numpy.percentile(possible, [LOW, HIGH]) if len(possible) else (value, value)
        return Figure(value, float(low), float(high))

    def _ratios(self, numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float | None, numpy.ndarray]:
        above, below = numpy.asarray(numerators, dtype=float), numpy.asarray(denominators, dtype=float)
        if not below.sum():
            return None, numpy.empty(0)
        with numpy.errstate(invalid="ignore", divide="ignore"):
            return float(above.sum() / below.sum()), (self.times @ above) / (self.times @ below)
