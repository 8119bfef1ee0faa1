"""Report: which records changed most, what a sentence claims, and how figures are written."""

import math
from dataclasses import replace

import pytest

from atomtune.evaluate.account import Account
from atomtune.evaluate.evaluation import Evaluation
from atomtune.evaluate.html_page import WIDTH, cells_of
from atomtune.evaluate.intervals import Figure
from atomtune.evaluate.likelihood import TargetScores
from atomtune.evaluate.metrics import ALL_METRICS, AnswerResult, RecordResult
from atomtune.evaluate.questions import EvalRecord, Question
from atomtune.evaluate.report import SHOWN, Report, make_report, markdown, shown
from atomtune.language import spoken, translated


@pytest.mark.parametrize(
    ("language", "sentence"),
    [
        ("en", "out compared with base. Better: Loss (nats per token) 3.00 → 1.00, chrF 10.0 → 30.0."),
        ("zh", "out 与 base 相比。更好：损失（每个词元的 nats） 3.00 → 1.00，chrF 10.0 → 30.0。"),
    ],
)
def test_a_sentence_has_the_punctuation_of_its_language(language, sentence):
    before = {"nats_per_token": Figure(3.0, 2.9, 3.1), "chrf": Figure(10.0, 9.0, 11.0)}
    after = {"nats_per_token": Figure(1.0, 0.9, 1.1), "chrf": Figure(30.0, 29.0, 31.0)}
    changes = {"nats_per_token": Figure(-2.0, -2.1, -1.9), "chrf": Figure(20.0, 19.0, 21.0)}
    report = Report(
        base_path="base",
        sources=["test.jsonl"],
        records=10,
        answers=10,
        models={"base": before, "out": after},
        changes={"out": changes},
        most_changed=[],
        max_new_tokens=8,
        stopped_early=False,
        lm_eval={},
        account=Account(10, (), {}, (), "alpaca", 64, held_out=False),
        made_from={},
    )
    with spoken(language):
        assert report.sentences(translated) == [sentence]


ACCOUNT = Account(20, (), {}, (), "alpaca", 64, held_out=False)
MEASURE = {metric.name: metric for metric in ALL_METRICS}


def result(nats: float, *texts: str) -> RecordResult:
    answers = tuple(AnswerResult(text, 10.0, False, True, 2, 2, False, None) for text in texts)
    return RecordResult(TargetScores(nats=nats, right=1, tokens=2), answers)


def report_of(changes: list[float]) -> Report:
    """A report on records of which each changes by so many nats; each has two questions with two answers."""
    records, base, tuned = [], [], []
    for row, change in enumerate(changes):
        questions = tuple(Question((1,), (2, 3), f"{kind} prompt", f"{kind} reference") for kind in ("first", "last"))
        records.append(EvalRecord(f"d:{row}", (), questions, frozenset()))
        base.append(result(100.0, "base's first", "base's last\nline"))
        tuned.append(result(100.0 + change, "tuned's first", "tuned's last\nline"))
    done = Evaluation(records, {"base": base, "out": tuned})
    more = {"sources": ["d"], "max_new_tokens": 8, "seed": 0, "account": ACCOUNT, "made_from": {}}
    return make_report(done, base_path="base", **more)


def test_the_records_that_changed_most_come_first_on_both_sides_with_their_last_answers():
    changes = [4.0, -2.0, 0.0, 8.0, -6.0, *(-0.1 * row for row in range(1, 11))]
    improved, worsened = report_of(changes).most_changed
    assert [record.origin for record in improved.records][:3] == ["d:4", "d:1", "d:14"]
    assert len(improved.records) == SHOWN and improved.title == "Most improved"
    assert [record.origin for record in worsened.records] == ["d:3", "d:0"]
    record = worsened.records[0]
    assert (record.prompt, record.reference) == ("last prompt", "last reference")
    assert record.answers == {"base": "base's last\nline", "out": "tuned's last\nline"}
    assert record.nats == {"base": 50.0, "out": 54.0}
    assert [side.title for side in report_of([1.0, 2.0]).most_changed] == ["Most worsened"]


def test_the_markdown_shows_every_line_of_a_text_as_it_is():
    text = markdown(report_of([4.0, -2.0]))
    assert "base (50.00 nats per token):\n\n    base's last\n    line\n" in text
    assert "| Loss (nats per token) | 50.00 (50.00–50.00) | 50.50 (" in text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("exact_match", 0.125, "12.5 %"),
        ("token_accuracy", 0.5, "50.0 %"),
        ("chrf", 33.333, "33.3"),
        ("nats_per_token", 1.234, "1.23"),
        ("perplexity", 999.0, "999.00"),
        ("perplexity", 1234.5, "1,234"),
        ("perplexity", 999_999_999.0, "999,999,999"),
        ("perplexity", 2.688e43, "2.7e+43"),
    ],
)
def test_a_figure_is_written_in_its_measures_unit(name, value, text):
    assert shown(MEASURE[name], value) == text


def test_a_sentence_tells_better_from_worse_and_from_what_is_unclear():
    names = ("nats_per_token", "chrf", "exact_match", "token_accuracy")
    changes = {name: Figure(-0.2, -0.3, -0.1) for name in names} | {"exact_match": Figure(-0.2, -0.3, 0.1)}
    before, after = ({name: Figure(value, 0.0, 1.0) for name in names} for value in (0.5, 0.3))
    more = (8, False, {}, ACCOUNT, {})
    report = Report("base", ["d"], 20, 20, {"base": before, "out": after}, {"out": changes}, [], *more)
    assert report.sentences() == [
        "out compared with base. Better: Loss (nats per token) 0.50 → 0.30. Worse: chrF 0.5 → 0.3. "
        "No clear difference with so few records: Exact match 50.0 % → 30.0 %."
    ]


def test_all_models_are_drawn_on_one_scale_and_judged_by_their_change():
    models = {"base": {"chrf": Figure(10.0, 5.0, 15.0)}, "out": {"chrf": Figure(40.0, 30.0, 50.0)}, "none": {}}
    changes = {"out": {"chrf": Figure(30.0, 20.0, 40.0)}, "none": {}}
    report = Report("base", ["d"], 20, 20, models, changes, [], 8, False, {}, ACCOUNT, {})
    base, out, none = cells_of(report, MEASURE["chrf"])
    assert base is not None and out is not None and none is None
    assert (base.left, out.right) == (6, WIDTH - 6)
    assert base.left < base.at < base.right < out.left < out.at < out.right
    assert (base.verdict, out.verdict) == ("", "better")


def test_the_infinite_perplexity_of_a_model_that_diverged_is_drawn_at_the_end_of_the_scale():
    # Regression: its place on the page was "nan", and a large one was written with all of its 300 digits.
    models = {"base": Figure(5.0, 4.0, 6.0), "out": Figure(math.inf, 900.0, math.inf), "other": Figure(*3 * [math.inf])}
    report = replace(report_of([1.0]), models={name: {"perplexity": figure} for name, figure in models.items()})
    base, out, other = cells_of(report, MEASURE["perplexity"])
    assert base is not None and out is not None and other is not None
    assert 6 == base.left < base.right < out.left == out.at == out.right == other.left == other.right == WIDTH - 6
    alone = replace(report, models={"out": {"perplexity": models["other"]}})
    (only,) = cells_of(alone, MEASURE["perplexity"])
    assert only is not None and only.at == WIDTH - 6 and only.text == "inf"
