"""Pace: how fast the steps of a run are, and how long it still takes; its evaluations are counted apart."""

import math
import time
from collections.abc import Callable

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy


class Pace:
    """Times a run while it goes.

    The first step counts until there is another: kernels are chosen and compiled in it, so it is a slow one.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = self._evaluated = self._first_took = 0.0  # seconds
        self._evaluations = self._first_step = 0

    def begin(self, step: int) -> None:
        """The run begins behind this step: 0, or the one it goes on from, whose evaluation may be made already."""
        self._began, self._first_step = self._clock() - self._evaluated, step

    def step_ended(self, step: int) -> None:
        if step == self._first_step + 1:
            self._first_took = self.seconds()

    def evaluated(self, seconds: float) -> None:
        """An evaluation has ended that took so long."""
        self._evaluated += seconds
        self._evaluations += 1

    def seconds(self) -> float:
        """Time since the run began, less its evaluations."""
        return max(self._clock() - self._began - self._evaluated, 1e-6)

    def left(self, step: int, steps: int, evaluations: int) -> float:
        """Seconds until the last of all steps, this one being done, with so many evaluations among them."""
        done = step - self._first_step
        a_step = (self.seconds() - self._first_took) / (done - 1) if done > 1 else self.seconds()
        return (steps - step) * a_step + evaluations * self._evaluated / max(self._evaluations, 1)


def evaluations_left(args: TrainingArguments, state: TrainerState) -> int:
    """How many evaluations are still to come."""
    step, steps = state.global_step, state.max_steps
    if args.eval_strategy == IntervalStrategy.STEPS:
        return steps // state.eval_steps - step // state.eval_steps
    if args.eval_strategy == IntervalStrategy.EPOCH and step and state.epoch:
        epochs = state.epoch * steps / step
        return math.ceil(round(epochs, 6)) - math.floor(round(state.epoch, 6))
    return 0
