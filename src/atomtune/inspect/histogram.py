"""Histogram: the lengths of records, and what a max_seq_length would cut."""

import math
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

Lengths = NDArray[numpy.int32]  # [N]

#: Suggested lengths are multiples of this, for which GPU kernels are fast.
STEP = 64
#: Most bars of a histogram.
_MOST_BARS = 14


@dataclass(frozen=True)
class Limit:
    """What a max_seq_length of `tokens` costs: `records` are longer, by `lost` tokens in total."""

    tokens: int
    records: int
    lost: int


@dataclass(frozen=True)
class Bar:
    """`count` values are between `low` and `high`, both inclusive."""

    low: int
    high: int
    count: int


def histogram(values: Lengths) -> list[Bar]:
    """At most _MOST_BARS bars of one round width; the last one may be wider, for values above the 99th percentile."""
    if not len(values):
        return []
    usual = int(numpy.percentile(values, 99, method="inverted_cdf"))
    longest = int(values.max())
    width = _round_width(usual, _MOST_BARS - 1)  # one bar is left for values above the 99th percentile
    last = usual // width  # index of the last bar
    if longest // width > last:
        last += 1
    bar_numbers = numpy.minimum(values // width, last)  # [N]
    counts = numpy.bincount(bar_numbers, minlength=last + 1)  # [bars]
    bars = []
    for number, count in enumerate(counts.tolist()):
        high = width * (number + 1) - 1
        if number == last:
            high = max(high, longest)
        bars.append(Bar(width * number, high, count))
    return bars


def _round_width(value: int, bars: int) -> int:
    """The smallest width of 1, 2, 5, 10, 20, 50, … with which this number of bars reaches `value`."""
    for power in range(10):  # up to 5 billion, beyond any length
        for digit in (1, 2, 5):
            width = digit * 10**power
            if value // width < bars:
                return width
    raise AssertionError(f"no width for {value}")


def percentiles(values: Lengths) -> dict[str, int]:
    """Percentiles by name. Each is a value that occurs, not the mean of two. {} if there are no values."""
    if not len(values):
        return {}
    marks = {"median": 50, "90 %": 90, "99 %": 99, "longest": 100}
    return {name: int(numpy.percentile(values, mark, method="inverted_cdf")) for name, mark in marks.items()}


def limit_at(longest: Lengths, tokens: int) -> Limit:
    """What a max_seq_length of `tokens` would cost."""
    over = longest[longest > tokens] - tokens
    tokens_lost = over.sum(dtype=numpy.int64)  # would overflow 32 bits for a million records
    return Limit(tokens, len(over), int(tokens_lost))


def suggested(longest: Lengths, *, most: int) -> tuple[Limit, Limit]:
    """The smallest multiple of STEP that no record exceeds, and the smallest that less than 1 % of records exceed.

    most  the number of tokens that the base model and the memory allow, an upper bound of both
    """
    assert len(longest)
    ordered = numpy.sort(longest)
    last = len(ordered) - 1
    for_all = min(_step_up(int(ordered[last])), most)
    for_most = min(_step_up(int(ordered[last - last // 100])), most)
    return limit_at(longest, for_all), limit_at(longest, for_most)


def _step_up(tokens: int) -> int:
    return math.ceil(tokens / STEP) * STEP
