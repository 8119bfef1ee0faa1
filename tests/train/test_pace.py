"""The time left in a run: from the steps so far, with evaluations counted separately."""

from types import SimpleNamespace

import pytest
from transformers import TrainerState, TrainingArguments

from atomtune.train.pace import Pace, evaluations_left


@pytest.fixture
def clock():
    return SimpleNamespace(now=100.0)


@pytest.fixture
def pace(clock) -> Pace:
    return Pace(clock=lambda: clock.now)


def test_evaluation_before_the_first_step_does_not_count_as_step_time(pace, clock):
    # 40 s of evaluation, then steps of 3 s: the estimate for 200 steps was two and a half hours.
    pace.begin(0)
    clock.now += 40
    pace.evaluated(40)
    clock.now += 3
    pace.step_ended(1)
    assert pace.left(1, 200, evaluations=4) == pytest.approx(199 * 3 + 4 * 40)
    assert pace.seconds() == pytest.approx(3)


def test_the_first_steps_duration_is_used_only_until_the_second_step(pace, clock):
    pace.begin(0)
    clock.now += 10
    pace.step_ended(1)
    assert pace.left(1, 5, evaluations=0) == pytest.approx(40)
    clock.now += 2
    pace.step_ended(2)
    assert pace.left(2, 5, evaluations=0) == pytest.approx(6)


def test_a_resumed_run_counts_its_own_steps(pace, clock):
    pace.begin(50)
    for step in (51, 52, 53):
        clock.now += 2
        pace.step_ended(step)
    assert pace.left(53, 60, evaluations=0) == pytest.approx(14)
    assert pace.left(60, 60, evaluations=0) == 0


def test_an_evaluation_due_on_resume_does_not_count_as_step_time(pace, clock):
    clock.now += 7
    pace.evaluated(7)  # before the first step of a resumed run
    pace.begin(4)
    clock.now += 2
    pace.step_ended(5)
    assert pace.seconds() == pytest.approx(2)
    assert pace.left(5, 6, evaluations=1) == pytest.approx(2 + 7)


@pytest.mark.parametrize(
    ("strategy", "step", "epoch", "left"),
    [
        ("steps", 0, 0, 4),
        ("steps", 5, 0.5, 3),
        ("steps", 20, 2.0, 0),
        ("epoch", 1, 0.1, 2),
        ("epoch", 10, 1.0, 1),
        ("epoch", 20, 2.0, 0),
        ("epoch", 3, 0.3, 2),
        ("no", 3, 0.3, 0),
    ],
)
def test_remaining_evaluations_are_counted(tmp_path, strategy, step, epoch, left):
    args = TrainingArguments(str(tmp_path), eval_strategy=strategy, eval_steps=5, use_cpu=True)
    state = TrainerState(global_step=step, max_steps=20, epoch=epoch, eval_steps=5)
    assert evaluations_left(args, state) == left
