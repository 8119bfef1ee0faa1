"""Metrics: from the results of each record to figures with intervals, and whether a model is better than the base."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from atomtune.evaluate.intervals import Bootstrap, Columns, Figure, share, share_difference
from atomtune.evaluate.likelihood import TargetScores
from atomtune.language import message


@dataclass(frozen=True)
class AnswerResult:
    """One generated answer, compared with its reference."""

    text: str
    chrf: float
    exact: bool
    stopped: bool
    tokens: int
    reference_tokens: int
    thinks: bool
    calls: tuple[bool, bool] | None  # where the reference calls a tool: (a call can be read, it names a known tool)


@dataclass(frozen=True)
class RecordResult:
    """One model's results for one record."""

    scores: TargetScores
    answers: tuple[AnswerResult, ...]


@dataclass(frozen=True)
class Score:
    """One metric of an lm-eval task, with its standard error if lm-eval computes one."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Metric:
    """A figure that is a ratio over records."""

    name: str
    title: str
    meaning: str
    better: Literal["lower", "higher", "neither"]
    parts: Callable[[RecordResult], tuple[float, float]]  # numerator and denominator of one record
    shares_answers: bool = False  # the share of answers that are, for example, exact: each is or is not


def _per_answer(value: Callable[[AnswerResult], float]) -> Callable[[RecordResult], tuple[float, float]]:
    return lambda result: (sum(map(value, result.answers)), len(result.answers))


def _per_call(which: int) -> Callable[[RecordResult], tuple[float, float]]:
    def parts(result: RecordResult) -> tuple[float, float]:
        calls = [answer.calls for answer in result.answers if answer.calls is not None]
        return sum(call[which] for call in calls), len(calls)

    return parts


NATS = Metric(
    "nats_per_token",
    "Loss (nats per token)",
    "how surprising the reference answers are to the model",
    "lower",
    lambda result: (result.scores.nats, result.scores.tokens),
)
METRICS: tuple[Metric, ...] = (
    NATS,
    Metric(
        "token_accuracy",
        "Token accuracy",
        "share of reference tokens that were the model's first choice",
        "higher",
        lambda result: (result.scores.right, result.scores.tokens),
    ),
    Metric(
        "chrf",
        "chrF",
        "similarity of generated and reference text by character n-grams, 0 to 100",
        "higher",
        _per_answer(lambda answer: answer.chrf),
    ),
    Metric(
        "exact_match",
        "Exact match",
        "share of answers equal to their reference",
        "higher",
        _per_answer(lambda answer: answer.exact),
        shares_answers=True,
    ),
    Metric(
        "stop_rate",
        "Stops by itself",
        "share of answers that end with a stop token before --max_new_tokens",
        "higher",
        _per_answer(lambda answer: answer.stopped),
        shares_answers=True,
    ),
    Metric(
        "length_ratio",
        "Length ratio",
        "generated tokens divided by reference tokens; 1 means as long as the references",
        "neither",
        lambda result: (
            sum(answer.tokens for answer in result.answers),
            sum(answer.reference_tokens for answer in result.answers),
        ),
    ),
    Metric(
        "think_rate",
        message("Thinks"),
        "share of answers that contain a thought",
        "neither",
        _per_answer(lambda answer: answer.thinks),
        shares_answers=True,
    ),
    Metric(
        "call_parse_rate",
        "Tool calls readable",
        "where the reference calls a tool: share of answers in which a call can be read",
        "higher",
        _per_call(0),
        shares_answers=True,
    ),
    Metric(
        "call_known_rate",
        "Tool calls known",
        "where the reference calls a tool: share of answers that call one of the available tools",
        "higher",
        _per_call(1),
        shares_answers=True,
    ),
)
PERPLEXITY = Metric(
    "perplexity",
    message("Perplexity"),
    "e to the power of the loss: among how many equally likely tokens the model seems to choose",
    "lower",
    NATS.parts,
)
PROBE = Metric(
    "probe_nats_per_token",
    "Forgetting probe (nats per token)",
    "how surprising the base's own answers to general prompts are; the base's figure is the floor",
    "lower",
    NATS.parts,
)
ALL_METRICS = (NATS, PERPLEXITY, *METRICS[1:], PROBE)


def figures_of(results: Sequence[RecordResult], draws: Bootstrap) -> dict[str, Figure]:
    """All figures of these records; without generated answers, only those of the likelihood."""
    figures: dict[str, Figure] = {}
    for metric in METRICS:
        columns = _columns(metric, results)
        figure = share(*columns) if metric.shares_answers else draws.ratio(*columns)
        if figure is not None:
            figures[metric.name] = figure
            if metric is NATS:
                figures[PERPLEXITY.name] = figure.exp()
    return figures


def differences(ours: Sequence[RecordResult], theirs: Sequence[RecordResult], draws: Bootstrap) -> dict[str, Figure]:
    """Our figures less theirs, record by record."""
    figures: dict[str, Figure] = {}
    for metric in METRICS:
        difference = share_difference if metric.shares_answers else draws.difference
        figure = difference(_columns(metric, ours), _columns(metric, theirs))
        if figure is not None:
            figures[metric.name] = figure
    return figures


def _columns(metric: Metric, results: Sequence[RecordResult]) -> Columns:
    numerators, denominators = [], []
    for result in results:
        above, below = metric.parts(result)
        numerators.append(above)
        denominators.append(below)
    return numerators, denominators


def probe_results(scores: Sequence[TargetScores]) -> list[RecordResult]:
    """The probe's scores in the form of records, so that the same code gives their figures."""
    return [RecordResult(score, ()) for score in scores]


def judged(metric: Metric, difference: Figure) -> Literal["better", "worse", "unclear", "other"]:
    """What the interval of a difference from the base says; it is unclear if the interval contains 0."""
    if difference.low <= 0 <= difference.high or not math.isfinite(difference.value):
        return "unclear"
    if metric.better == "neither":
        return "other"
    is_lower, lower_is_better = difference.value < 0, metric.better == "lower"
    return "better" if is_lower == lower_is_better else "worse"


def change_per_record(ours: Sequence[RecordResult], theirs: Sequence[RecordResult]) -> list[float]:
    """Of each record, our nats per token less theirs: below 0 is an improvement."""
    pairs = zip(ours, theirs, strict=True)
    return [our_result.scores.nats_per_token - their_result.scores.nats_per_token for our_result, their_result in pairs]
