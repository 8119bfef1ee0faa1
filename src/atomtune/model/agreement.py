"""Agreement: whether two computations of one model differ by more than rounding does.

The largest difference over all positions and a vocabulary of 49,000 words measures rounding, not faults: in bfloat16
the same model computed by two of transformers' own attention functions differs by 2 nats somewhere. So two
computations are judged by means and high quantiles, beside the same figures of two plain runs of this very model: its
own noise. What was measured, with planted faults of several sizes: docs/log.md.
Letters: N positions, V words.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from atomtune.model.attention_in_use import AttentionInUse
from atomtune.model.causal_lm import CausalLM
from atomtune.model.loss import innermost
from atomtune.model.scores import names_a_cap

#: How many times its own noise a right computation may lie apart. Right ones were seen at 0.1 to 1.7 times.
TIMES_NOISE = 3.0
#: Two plain runs may happen to round alike. So many units in the last place are rounding whatever they say.
LEAST_ULPS = 1.0
#: A gradient that is lost differs by 1 from the right one (relative). In bfloat16 a delta rule's noise is 0.4.
MOST_GRADIENT = 0.9


def unit(dtype: torch.dtype) -> float:
    """A unit in the last place. Not below float32's: norms and rotary embeddings compute in it whatever the dtype."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Measure:
    """One figure of a comparison: how far apart the two computations lie, and how far two plain runs do."""

    name: str
    apart: float
    noise: float
    least: float  # counts as rounding even where the noise is smaller
    times: float = TIMES_NOISE
    most: float = math.inf  # is a fault whatever the noise is

    @property
    def allowed(self) -> float:
        return min(max(self.times * self.noise, self.least), self.most)

    @property
    def holds(self) -> bool:
        return self.apart <= self.allowed  # False for NaN


def log_probability_measures(
    ours: torch.Tensor, plain: torch.Tensor, again: torch.Tensor, *, dtype: torch.dtype
) -> list[Measure]:
    """Compare log-probabilities of the target tokens.

    ours, plain, again  [N]  the computation to judge, a plain run, and another plain run
    """
    apart, noise = (ours - plain).abs(), (again - plain).abs()
    # A softmax in float32 gives log-probabilities whose units grow with their size: 1e-6 where a word has 1e-5.
    least = LEAST_ULPS * (unit(dtype) + unit(torch.float32) * _mean(plain.abs()))
    return [
        Measure("log-probability, mean", _mean(apart), _mean(noise), least),
        Measure("log-probability, 99th percentile", _high(apart), _high(noise), 2 * least),
    ]


def distribution_measures(
    ours: torch.Tensor, plain: torch.Tensor, again: torch.Tensor, *, dtype: torch.dtype
) -> list[Measure]:
    """Compare whole distributions over the next token.

    ours, plain, again  [N, V]  log-probabilities, as above
    """
    apart, noise = divergence(plain, ours), divergence(plain, again)  # [N]
    # A divergence is of second order: log-probabilities that differ by d have one of about d * d / 2. Their units grow
    # with their size, as above; a likely word counts more, so the size is that of the mean surprise.
    surprise = _mean(-(plain.exp() * plain).sum(-1))
    least = (LEAST_ULPS * (unit(dtype) + unit(torch.float32) * surprise)) ** 2
    times = TIMES_NOISE**2
    return [
        Measure("divergence of the next token (KL), mean", _mean(apart), _mean(noise), least, times),
        Measure("divergence of the next token (KL), 99th percentile", _high(apart), _high(noise), 4 * least, times),
        Measure("share of different top tokens", other_top(plain, ours) / len(plain), _likely_share(plain, again), 0.0),
    ]


def gradient_measures(
    ours: Mapping[str, torch.Tensor],
    plain: Mapping[str, torch.Tensor],
    again: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
) -> list[Measure]:
    """Compare gradients by relative L2 norm: of the worst weight, and of all weights together."""
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
    """The name of the weight whose gradients differ most, relatively."""
    return max(plain, key=lambda name: relative_difference(ours, plain, [name]))


def divergence(plain: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(plain || other) of each position, [N, V] log-probabilities → [N]; rounding below zero is zero."""
    return (plain.exp() * (plain - other)).sum(-1).clamp(min=0)


def other_top(plain: torch.Tensor, other: torch.Tensor) -> int:
    """At how many positions the likeliest token is another one."""
    return int((plain.argmax(-1) != other.argmax(-1)).sum())


def _likely_share(plain: torch.Tensor, again: torch.Tensor) -> float:
    """The share of other top tokens that chance may give: a count of k is known to about 2 sqrt(k) + 1."""
    count = other_top(plain, again)
    return (count + 2 * count**0.5 + 1) / len(plain)


def relative_difference(
    ours: Mapping[str, torch.Tensor], plain: Mapping[str, torch.Tensor], names: Sequence[str] | None = None
) -> float:
    """|ours - plain| / |plain| over the named weights; infinite where a gradient is NaN or there is none to compare."""
    apart = size = 0.0
    for name in names or plain:
        apart += (ours[name] - plain[name]).square().sum().item()
        size += plain[name].square().sum().item()
    if not size:
        return 0.0 if apart == 0 else float("inf")
    ratio = (apart / size) ** 0.5
    return float("inf") if math.isnan(ratio) else ratio


def _mean(values: torch.Tensor) -> float:
    return values.mean().item()


def _high(values: torch.Tensor) -> float:
    """The 99th percentile. torch.quantile stops at 16 million values; a sort does not."""
    return values.sort().values[int(0.99 * (len(values) - 1))].item()


@contextlib.contextmanager
def another_plain_way(model: CausalLM) -> Iterator[bool]:
    """Within this, the model rounds otherwise, and computes the same; False where it knows one attention only.

    The difference that this makes is the noise of the model in its dtype. Two things are changed:
    - The attention is another of transformers' own functions, where it has one that computes the same (not gpt-oss with
      its sinks, not Gemma 2 with its caps, not Mamba).
    - The embeddings are rounded otherwise, so that all later layers round otherwise too. In Qwen3.5 few layers attend,
      and another attention alone showed a thirtieth of the rounding.
    Another batch or another order of records shows less, because most roundings then stay the same.
    """
    inner = innermost(model)
    before, name = AttentionInUse.of(inner), inner.config._attn_implementation
    other = "sdpa" if name == "eager" else "eager"
    computes_the_same = not (names_a_cap(inner.config) and "sdpa" in (name, other))
    embeddings: Any = inner.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _module, _inputs, hidden: rounded_otherwise(hidden))
    try:
        with contextlib.suppress(ValueError, ImportError, AttributeError):
            if computes_the_same:
                inner.set_attn_implementation(other)
        yield inner.config._attn_implementation == other
    finally:
        hook.remove()
        before.give_back()


def rounded_otherwise(hidden: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second one by a unit in the last place larger."""
    ones = torch.ones_like(hidden).flatten()
    ones[::2] += torch.finfo(hidden.dtype).eps
    return hidden * ones.view_as(hidden)
