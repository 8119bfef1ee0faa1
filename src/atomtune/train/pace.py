"""Pace: how fast a run's steps are, and how long it will still take; evaluations are timed separately."""

import math
import time
from collections.abc import Callable

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy


class Pace:
    """Times a running run.

    The first step is slow, because kernels are chosen and compiled in it, so it counts only until there is a second
    one.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = self._evaluated = self._first_took = 0.0  # seconds
        self._evaluations = self._first_step = 0

    def begin(self, step: int) -> None:
        """Start timing after this step: 0, or the one from which the run resumes.

        An evaluation may already have been made.
        """
        self._began, self._first_step = self._clock() - self._evaluated, step

    def step_ended(self, step: int) -> None:
        if step == self._first_step + 1:
            self._first_took = self.seconds()

    def evaluated(self, seconds: float) -> None:
        """Count an evaluation that took this long."""
        self._evaluated += seconds
        self._evaluations += 1

    def seconds(self) -> float:
        """Seconds since the run began, without its evaluations."""
        return max(self._clock() - self._began - self._evaluated, 1e-6)

    def left(self, step: int, steps: int, evaluations: int) -> float:
        """Seconds from `step` to the last of `steps`, including this number of evaluations."""
        done = step - self._first_step
        a_step = (self.seconds() - self._first_took) / (done - 1) if done > 1 else self.seconds()
        return (steps - step) * a_step + evaluations * self._evaluated / max(self._evaluations, 1)


def evaluations_left(args: TrainingArguments, state: TrainerState) -> int:
    """How many evaluations are still to come in the run."""
    step, steps = state.global_step, state.max_steps
    if args.eval_strategy == IntervalStrategy.STEPS:
        return steps // state.eval_steps - step // state.eval_steps
    if args.eval_strategy == IntervalStrategy.EPOCH and step and state.epoch:
        epochs = state.epoch * steps / step
        return math.ceil(round(epochs, 6)) - math.floor(round(state.epoch, 6))
    return 0
