"""Measures: each figure is the ratio that its meaning says, and a verdict needs an interval on one side of 0."""

import math

import pytest
from pytest import approx

from atomtune.evaluate.intervals import Bootstrap, Figure
from atomtune.evaluate.likelihood import TargetScores
from atomtune.evaluate.metrics import (
    ALL_METRICS,
    AnswerResult,
    RecordResult,
    change_per_record,
    differences,
    figures_of,
    judged,
)

#: Two records; the first has two answers, of which one should call a tool.
RECORDS = [
    RecordResult(
        TargetScores(nats=6.0, right=2, tokens=4),
        (
            AnswerResult("a", 50.0, True, True, 3, 4, False, None),
            AnswerResult("b", 20.0, False, True, 5, 4, True, (True, False)),
        ),
    ),
    RecordResult(
        TargetScores(nats=12.0, right=3, tokens=8),
        (AnswerResult("c", 80.0, False, False, 8, 2, False, (True, True)),),
    ),
]
BY_HAND = {
    "nats_per_token": 18 / 12,
    "perplexity": math.exp(18 / 12),
    "token_accuracy": 5 / 12,
    "chrf": 150 / 3,
    "exact_match": 1 / 3,
    "stop_rate": 2 / 3,
    "length_ratio": 16 / 10,
    "think_rate": 1 / 3,
    "call_parse_rate": 2 / 2,
    "call_known_rate": 1 / 2,
}


def test_every_figure_is_the_ratio_that_its_meaning_says():
    figures = figures_of(RECORDS, Bootstrap(2, seed=0))
    assert {name: figure.value for name, figure in figures.items()} == approx(BY_HAND)
    assert figures["perplexity"].as_list() == approx([math.exp(end) for end in figures["nats_per_token"].as_list()])
    without_answers = [RecordResult(record.scores, ()) for record in RECORDS]
    assert set(figures_of(without_answers, Bootstrap(2, seed=0))) == {"nats_per_token", "perplexity", "token_accuracy"}


def test_a_change_is_our_figure_less_theirs():
    ours, theirs = RECORDS[:1] * 2, RECORDS[1:] * 2
    changes = differences(ours, theirs, Bootstrap(2, seed=0))
    assert {name: changes[name].value for name in ("token_accuracy", "chrf", "exact_match", "length_ratio")} == approx(
        {"token_accuracy": 2 / 4 - 3 / 8, "chrf": 35 - 80, "exact_match": 1 / 2, "length_ratio": 1 - 4}
    )
    assert change_per_record(RECORDS[:1], RECORDS[1:]) == [6 / 4 - 12 / 8]
    assert change_per_record(RECORDS[:1], [RecordResult(TargetScores(8.0, 0, 4), ())]) == [-0.5]


@pytest.mark.parametrize("metric", ALL_METRICS, ids=lambda metric: metric.name)
def test_a_verdict_needs_an_interval_on_one_side_of_zero(metric):
    lower, higher = {"lower": ("better", "worse"), "higher": ("worse", "better"), "neither": ("other", "other")}[
        metric.better
    ]
    assert judged(metric, Figure(-2.0, -3.0, -1.0)) == lower
    assert judged(metric, Figure(2.0, 1.0, 3.0)) == higher
    for unclear in (Figure(-2.0, -3.0, 1.0), Figure(2.0, 0.0, 3.0), Figure(-2.0, -3.0, 0.0), Figure(0.0, 0.0, 0.0)):
        assert judged(metric, unclear) == "unclear"
    assert judged(metric, Figure(math.inf, 1.0, math.inf)) == judged(metric, Figure(math.nan, 1.0, 2.0)) == "unclear"


def test_which_direction_is_better_is_known_for_each_measure():
    directions = {metric.name: metric.better for metric in ALL_METRICS}
    lower = {"nats_per_token", "perplexity", "probe_nats_per_token"}
    neither = {"length_ratio", "think_rate"}
    expected = {name: "lower" if name in lower else "neither" if name in neither else "higher" for name in directions}
    assert directions == expected
