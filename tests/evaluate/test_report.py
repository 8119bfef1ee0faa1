"""Report: its sentences have the punctuation of the user's language."""

import pytest

from atomtune.evaluate.account import Account
from atomtune.evaluate.intervals import Figure
from atomtune.evaluate.report import Report
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
