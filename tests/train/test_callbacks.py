"""Callbacks report the problems that they watch for, and hear the signals that stop a run."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import IntervalStrategy, TrainerControl, TrainerState

from atomtune.train.callbacks import (
    SAME_REQUEST_SECONDS,
    GradientCheck,
    LogBeforeSaving,
    LossSpikeWarning,
    Stop,
    WorkCounter,
)


def state(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step)


def spikes_of(losses: list[float]) -> list[str]:
    said: list[str] = []
    spikes = LossSpikeWarning(said.append)
    for step, loss in enumerate(losses):
        spikes.on_log(None, state(step), None, logs={"loss": loss})
    return said


def test_a_loss_spike_is_reported_with_its_step():
    (said,) = spikes_of([2.0, 1.9, 2.1] * 5 + [6.5, 2.0])
    assert "jumped to 6.500 at step 15; it was 2.000" in said


@pytest.mark.parametrize("losses", [[9.0 - 0.3 * n for n in range(25)], [2.0, 2.6, 1.5, 2.4, 1.7] * 6, [2.0, 9.0]])
def test_falling_and_noisy_losses_are_not_reported_as_spikes(losses):
    assert spikes_of(losses) == []


def test_evaluations_do_not_count_as_seconds_of_training(monkeypatch):
    # They would make examples_per_second smaller: 200 held-out records are evaluated eleven times in a default run.
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    work = WorkCounter()
    work.on_evaluate(None, state(0), None, metrics={"eval_runtime": 7.0})  # before training
    work.on_train_begin(None, SimpleNamespace(global_step=0, stateful_callbacks={}), None)
    now = 130.0
    work.on_evaluate(None, state(5), None, metrics={"eval_runtime": 10.0})
    assert work.state()["attributes"]["seconds"] == 20.0  # in a checkpoint
    now = 135.0
    work.on_train_end(None, state(5), None)
    assert work.elapsed() == 25.0


def test_every_count_goes_on_when_a_run_is_resumed():
    before, after = WorkCounter(), WorkCounter()
    names = [name for name in vars(before) if not name.startswith("_")]
    for count, name in enumerate(names, 1):
        setattr(before, name, count)
    carried = SimpleNamespace(global_step=5, stateful_callbacks={"WorkCounter": before.state()})
    after.on_train_begin(None, carried, None)
    assert {name: getattr(after, name) for name in names} == {name: getattr(before, name) for name in names}


@pytest.mark.parametrize(
    ("strategy", "delay", "epoch", "step", "owes"),
    [
        ("epoch", 0, 1.0, 10, True),
        ("epoch", 0, 0.9, 9, False),
        ("epoch", 0, 1.4, 14, True),  # the run's last step, within an epoch
        ("epoch", 2, 1.0, 10, False),  # an evaluation that was never due
        ("epoch", 1, 1.0, 10, True),
        ("steps", 0, 1.0, 10, False),  # made before the checkpoint is saved
    ],
)
def test_an_evaluation_is_owed_after_the_epochs_that_end_with_one(strategy, delay, epoch, step, owes):
    args = SimpleNamespace(eval_strategy=IntervalStrategy(strategy), eval_delay=delay)
    work = WorkCounter()
    work.on_step_end(args, SimpleNamespace(epoch=epoch, global_step=step, max_steps=14), None)
    assert work.owes_evaluation is owes


@pytest.mark.parametrize("due", ["should_save", "should_evaluate"])
@pytest.mark.parametrize("moment", ["on_step_end", "on_epoch_end"])
def test_losses_are_logged_before_each_checkpoint_and_evaluation(due, moment):
    # The run may end with either of them, and what was not logged is lost.
    control = TrainerControl(**{due: True})
    getattr(LogBeforeSaving(), moment)(None, TrainerState(global_step=3, max_steps=9), control)
    assert control.should_log


def model() -> torch.nn.Module:
    made = torch.nn.Module()
    made.lora_A, made.lora_B = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 3, bias=False)
    return made


def test_layers_without_gradient_are_named_once():
    said: list[str] = []
    one, check = model(), GradientCheck(said.append)
    one.lora_B(one.lora_A(torch.zeros(1, 3))).sum().backward()  # a zero input: no gradient for B
    for _ in range(2):
        check.on_pre_optimizer_step(None, state(0), None, model=one)
    assert len(said) == 1
    assert "no gradient reaches 1 of 1 adapter layers" in said[0]


def test_layers_with_gradient_are_not_mentioned():
    one = model()
    one.lora_B(one.lora_A(torch.ones(1, 3))).sum().backward()
    GradientCheck(pytest.fail).on_pre_optimizer_step(None, state(0), None, model=one)


def with_gradient(value: float) -> torch.nn.Module:
    one = model()
    for weight in one.parameters():
        weight.grad = torch.full_like(weight, value)
    return one


def test_the_gradient_check_ignores_steps_with_non_finite_gradients():
    said: list[str] = []
    check = GradientCheck(said.append)
    check.on_pre_optimizer_step(None, state(0), None, model=with_gradient(float("nan")))
    check.on_pre_optimizer_step(None, state(1), None, model=with_gradient(0.0))
    assert len(said) == 1, "the first step that can tell"


@pytest.fixture
def stop():
    """A Stop that hears this process's signals."""
    hears = Stop(deadline=None, limit="")
    hears.on_train_begin(None, None, None)
    yield hears
    hears.restore()


def test_the_same_signal_again_at_once_is_one_request(stop):
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
    assert stop.received == signal.SIGTERM


@pytest.mark.parametrize(
    ("second", "after"), [(signal.SIGINT, 0), (signal.SIGTERM, SAME_REQUEST_SECONDS + 0.1)], ids=["another", "later"]
)
def test_another_signal_or_a_later_one_ends_the_process_at_once(stop, second, after):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(after)
    with pytest.raises(KeyboardInterrupt, match=second.name):
        os.kill(os.getpid(), second)
        time.sleep(5)
