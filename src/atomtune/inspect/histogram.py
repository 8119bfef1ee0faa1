"""Histogram: how long records are, and what a max_seq_length would cost them."""

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
    usual, longest = int(numpy.percentile(values, 99, method="inverted_cdf")), int(values.max())
    round_widths = (digit * 10**power for power in range(10) for digit in (1, 2, 5))
    width = next(width for width in round_widths if usual // width < most - 1)
    last = usual // width  # number of the last bar
    if longest // width > last:
        last += 1
    counts = numpy.bincount(numpy.minimum(values // width, last), minlength=last + 1)  # [bars]
    bars = [Bar(width * number, width * (number + 1) - 1, int(count)) for number, count in enumerate(counts)]
    bars[-1] = Bar(bars[-1].low, max(bars[-1].high, longest), bars[-1].count)
    return bars


def percentiles(values: Lengths) -> dict[str, int]:
    """Of lengths: values that occur, no means of two."""
    if not len(values):
        return {}
    marks = {"median": 50, "90 %": 90, "99 %": 99, "longest": 100}
    return {name: int(numpy.percentile(values, mark, method="inverted_cdf")) for name, mark in marks.items()}


def limit_at(longest: Lengths, tokens: int) -> Limit:
    """What this max_seq_length would cost."""
    over = longest[longest > tokens] - tokens
    return Limit(tokens, len(over), int(over.sum(dtype=numpy.int64)))


def suggested(longest: Lengths) -> tuple[Limit, Limit]:
    """The smallest multiple of STEP that no record is longer than, and the one that less than 1 % are longer than."""
    assert len(longest)
    ordered = numpy.sort(longest)
    spared = ordered[len(ordered) - 1 - (len(ordered) - 1) // 100]
    return limit_at(longest, _step_up(int(ordered[-1]))), limit_at(longest, _step_up(int(spared)))


def _step_up(tokens: int) -> int:
    return -(-tokens // STEP) * STEP
