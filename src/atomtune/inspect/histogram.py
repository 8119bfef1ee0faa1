"""Histogram: how long records are, and what a max_seq_length would cost them."""

import math
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

Lengths = NDArray[numpy.int32]  # [N]

#: Suggested lengths are multiples of this, as the kernels of accelerators like them.
STEP = 64


@dataclass(frozen=True)
class Limit:
    """What a max_seq_length costs: so many records are longer, by so many tokens together."""

    tokens: int
    records: int
    lost: int


@dataclass(frozen=True)
class Bar:
    """So many values from `low` to `high`, both included."""

    low: int
    high: int
    count: int


def histogram(values: Lengths, *, most: int = 14) -> list[Bar]:
    """Bars of one round width, at most so many; what is longer than 99 in 100 may share the last one."""
    if not len(values):
        return []
    usual = int(numpy.percentile(values, 99, method="inverted_cdf"))
    longest = int(values.max())
    width = _round_width(usual, most - 1)  # a bar is left for the longer ones
    last = usual // width  # number of the last bar
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
    """The smallest of 1, 2, 5, 10, 20, 50, … with which so many bars reach this value."""
    for power in range(10):  # to 5 billion, beyond any length
        for digit in (1, 2, 5):
            width = digit * 10**power
            if value // width < bars:
                return width
    raise AssertionError(f"no width for {value}")


def percentiles(values: Lengths) -> dict[str, int]:
    """Of lengths: values that occur, no means of two."""
    if not len(values):
        return {}
    marks = {"median": 50, "90 %": 90, "99 %": 99, "longest": 100}
    return {name: int(numpy.percentile(values, mark, method="inverted_cdf")) for name, mark in marks.items()}


def limit_at(longest: Lengths, tokens: int) -> Limit:
    """What this max_seq_length would cost."""
    over = longest[longest > tokens] - tokens
    tokens_lost = over.sum(dtype=numpy.int64)  # a million records pass what 32 bits hold
    return Limit(tokens, len(over), int(tokens_lost))


def suggested(longest: Lengths, *, most: int) -> tuple[Limit, Limit]:
    """The smallest multiple of STEP that no record is longer than, and the one that less than 1 % are longer than.

    most  tokens that the base and the memory allow; neither is longer
    """
    assert len(longest)
    ordered = numpy.sort(longest)
    last = len(ordered) - 1
    for_all = min(_step_up(int(ordered[last])), most)
    for_most = min(_step_up(int(ordered[last - last // 100])), most)
    return limit_at(longest, for_all), limit_at(longest, for_most)


def _step_up(tokens: int) -> int:
    return math.ceil(tokens / STEP) * STEP
