"""Samples have a time limit: an answer cut short is shown only if there is no complete one."""

import pytest
from torch import nn

from atomtune.train import samples
from atomtune.train.samples import Samples


@pytest.mark.parametrize(
    ("answers", "shown"),
    [
        ([10, 10, 5], ["1", "2", "3"]),
        ([20, 20, 20], ["1"]),  # the second is cut short
        ([40, 20, 20], ["1"]),
    ],
    ids=["in time", "second late", "first late"],
)
def test_an_answer_cut_by_the_time_limit_is_omitted_if_another_exists(monkeypatch, answers, shown):
    durations, now = iter(answers), 0.0

    def answer(self, prompt, *, seconds: float):
        nonlocal now
        now += min(next(durations), seconds)
        return str(prompt[0]), False

    monkeypatch.setattr(samples.time, "monotonic", lambda: now)
    monkeypatch.setattr(Samples, "_answer", answer)
    of_run = Samples(None, nn.Identity(), None, prompts=[[1], [2], [3]])
    assert [text for text, _ in of_run._answers()] == shown
