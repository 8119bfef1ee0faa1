"""Agreement: whether two computations of one model differ by more than rounding does.

For single values rounding can be large: in bfloat16, two of transformers' own attention functions differ by 2 nats at
some position and some of 49,000 tokens. The maximum therefore says nothing about faults. Means and high quantiles are
compared instead, with the same figures of two plain runs of this model: its noise. Measurements with planted faults of
several sizes: docs/log.md.
Letters: N positions, V vocabulary size.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from atomtune.model.attention_in_use import AttentionInUse
from atomtune.model.causal_lm import CausalLM
from atomtune.model.loss import innermost
from atomtune.model.scores import names_a_cap

#: A correct computation may differ by this many times the noise. Correct ones were measured at 0.1 to 1.7 times.
TIMES_NOISE = 3.0
#: Differences of this many units in the last place always count as rounding: two plain runs may round alike by chance.
LEAST_ULPS = 1.0
#: A lost gradient has a relative difference of 1. The noise of a delta rule in bfloat16 is 0.4.
MOST_GRADIENT = 0.9


def unit(dtype: torch.dtype) -> float:
    """A unit in the last place, at least float32's: norms and rotary embeddings compute in float32 in every dtype."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Measure:
    """One figure of a comparison: the difference of two computations, and that of two plain runs (the noise)."""

    name: str
    difference: float
    noise: float
    least: float  # a smaller difference counts as rounding, even if the noise is smaller still
    times: float = TIMES_NOISE
    most: float = math.inf  # a larger difference is a fault, however large the noise is

    @property
    def allowed(self) -> float:
        return min(max(self.times * self.noise, self.least), self.most)

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed  # False for NaN


def log_probability_measures(
    ours: torch.Tensor, plain: torch.Tensor, again: torch.Tensor, *, dtype: torch.dtype
) -> list[Measure]:
    """Compare log-probabilities of the target tokens.

    ours, plain, again  [N]  the computation to judge, a plain run and a second plain run
    """
    difference, noise = (ours - plain).abs(), (again - plain).abs()
    # A float32 softmax rounds large log-probabilities more coarsely: by 1e-6 for a token with probability 1e-5.
    least = LEAST_ULPS * (unit(dtype) + unit(torch.float32) * _mean(plain.abs()))
    return [
        Measure("log-probability, mean", _mean(difference), _mean(noise), least),
        Measure("log-probability, 99th percentile", _high(difference), _high(noise), 2 * least),
    ]


def distribution_measures(
    ours: torch.Tensor, plain: torch.Tensor, again: torch.Tensor, *, dtype: torch.dtype
) -> list[Measure]:
    """Compare whole distributions over the next token.

    ours, plain, again  [N, V]  log-probabilities, as in log_probability_measures
    """
    difference, noise = divergence(plain, ours), divergence(plain, again)  # [N]
    # A divergence is of second order: if log-probabilities differ by d, it is about d * d / 2. Their rounding grows
    # with their size, as above. Likely tokens weigh more, so the mean surprise is taken as that size.
    surprise = _mean(-(plain.exp() * plain).sum(-1))
    least = (LEAST_ULPS * (unit(dtype) + unit(torch.float32) * surprise)) ** 2
    times = TIMES_NOISE**2
    return [
        Measure("divergence of the next token (KL), mean", _mean(difference), _mean(noise), least, times),
        Measure(
            "divergence of the next token (KL), 99th percentile", _high(difference), _high(noise), 4 * least, times
        ),
        Measure("share of different top tokens", other_top(plain, ours) / len(plain), _likely_share(plain, again), 0.0),
    ]


def gradient_measures(
    ours: Mapping[str, torch.Tensor],
    plain: Mapping[str, torch.Tensor],
    again: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
) -> list[Measure]:
    """Compare gradients by relative L2 norm: of all weights together, and of the weight that differs most."""
    least = 2 * LEAST_ULPS * unit(dtype)
    worst = worst_gradient(ours, plain)
    return [
        Measure(
            "gradients of all weights (relative)",
            relative_difference(ours, plain),
            relative_difference(again, plain),
            least,
            most=MOST_GRADIENT,
        ),
        Measure(
            "gradient of the worst weight (relative)",
            relative_difference(ours, plain, [worst]),
            relative_difference(again, plain, [worst_gradient(again, plain)]),
            2 * least,
            most=MOST_GRADIENT,
        ),
    ]


def worst_gradient(ours: Mapping[str, torch.Tensor], plain: Mapping[str, torch.Tensor]) -> str:
    """The name of the weight with the largest relative difference of gradients."""
    return max(plain, key=lambda name: relative_difference(ours, plain, [name]))


def divergence(plain: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(plain || other) at each position: [N, V] log-probabilities → [N]; negative rounding errors become zero."""
    return (plain.exp() * (plain - other)).sum(-1).clamp(min=0)


def other_top(plain: torch.Tensor, other: torch.Tensor) -> int:
    """At how many positions the most likely token differs."""
    return int((plain.argmax(-1) != other.argmax(-1)).sum())


def _likely_share(plain: torch.Tensor, again: torch.Tensor) -> float:
    """Share of differing top tokens that chance may give: a count of k is uncertain by about 2 sqrt(k) + 1."""
    count = other_top(plain, again)
    return (count + 2 * count**0.5 + 1) / len(plain)


def relative_difference(
    ours: Mapping[str, torch.Tensor], plain: Mapping[str, torch.Tensor], names: Sequence[str] | None = None
) -> float:
    """|ours - plain| / |plain| over the named weights (default: all); infinite if NaN, or if only plain is zero."""
    difference = size = 0.0
    for name in names or plain:
        difference += (ours[name] - plain[name]).square().sum().item()
        size += plain[name].square().sum().item()
    if not size:
        return 0.0 if difference == 0 else float("inf")
    ratio = (difference / size) ** 0.5
    return float("inf") if math.isnan(ratio) else ratio


def _mean(values: torch.Tensor) -> float:
    return values.mean().item()


def _high(values: torch.Tensor) -> float:
    """The 99th percentile. torch.quantile accepts at most 16 million values, so the values are sorted."""
    return values.sort().values[int(0.99 * (len(values) - 1))].item()


@contextlib.contextmanager
def another_plain_way(model: CausalLM) -> Iterator[None]:
    """Within this context the model computes the same with other rounding; the difference is its noise in its dtype.

    Two things are changed:
    - The attention: another of transformers' own functions, if the model has one that computes the same (not gpt-oss
      with its sinks, not Gemma 2 with its soft caps, not Mamba).
    - The embeddings are rounded differently, and so is every later layer. Few layers of Qwen3.5 have attention, and
      another attention function alone showed a thirtieth of the rounding.
    Another batch or another order of the records shows less noise, because most roundings stay the same.
    """
    inner = innermost(model)
    before, name = AttentionInUse.of(inner), inner.config._attn_implementation
    other = "sdpa" if name == "eager" else "eager"
    computes_the_same = not (names_a_cap(inner.config) and "sdpa" in (name, other))
    hook = inner.get_input_embeddings().register_forward_hook(lambda _m, _i, hidden: rounded_otherwise(hidden))
    try:
        with contextlib.suppress(ValueError, ImportError, AttributeError):
            if computes_the_same:
                inner.set_attn_implementation(other)
        yield
    finally:
        hook.remove()
        before.give_back()


def rounded_otherwise(hidden: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second one larger by a unit in the last place."""
    ones = torch.ones_like(hidden).flatten()
    ones[::2] += torch.finfo(hidden.dtype).eps
    return hidden * ones.view_as(hidden)
