"""Callbacks: count a run's work, stop it cleanly, and watch its losses and gradients.

Losses and gradients that are not finite are handled in non_finite.py.
"""

import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from atomtune.errors import listing
from atomtune.process import STOP_SIGNALS
from atomtune.train.ranks import local, on_any_rank
from atomtune.train.run_report import logged

#: The same signal again within this many seconds is the same request: a cluster signals every process of a job, and
#: torchrun, which is one of them, passes the signal on to its own.
SAME_REQUEST_SECONDS = 1.0


class WorkCounter(TrainerCallback, ExportableState):
    """Counts what the run computes. Checkpoints keep the counts, so that a resumed run reports the whole run.

    owes_evaluation  an evaluation was due at this step but not made; a run resumed here makes it first
    """

    #: The counts that a checkpoint keeps, besides the seconds.
    CARRIED = (
        *("tokens_computed", "tokens_padded", "examples", "owes_evaluation"),
        *("skipped_steps", "steps_without_gradient"),
    )

    def __init__(self) -> None:
        self.tokens_computed = 0
        self.tokens_padded = 0
        self.examples = 0
        self.seconds = 0.0
        self.skipped_steps = 0
        self.steps_without_gradient = 0
        self.owes_evaluation = False
        self._since = 0.0

    def add(self, *, tokens_computed: int, tokens_padded: int, examples: int) -> None:
        self.tokens_computed += tokens_computed
        self.tokens_padded += tokens_padded
        self.examples += examples

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note an epoch's evaluation as owed: it comes after the checkpoint of the epoch's last step."""
        ends = state.epoch == round(state.epoch) or state.global_step >= state.max_steps
        by_epoch = args.eval_strategy == IntervalStrategy.EPOCH
        self.owes_evaluation = by_epoch and ends and args.eval_delay <= state.epoch

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.owes_evaluation = False
        if self._since:  # during training
            self.seconds -= kwargs["metrics"].get("eval_runtime", 0.0)

    def state(self) -> dict[str, Any]:
        attributes = {name: getattr(self, name) for name in self.CARRIED}
        attributes["seconds"] = self.elapsed()
        return {"args": {}, "attributes": attributes}

    def elapsed(self) -> float:
        """Seconds of training, without evaluations, so that the examples of a second are those that were trained on."""
        return self.seconds + (time.perf_counter() - self._since if self._since else 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            for name in (*self.CARRIED, "seconds"):
                setattr(self, name, saved["attributes"].get(name, getattr(self, name)))
        self._since = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds, self._since = self.elapsed(), 0.0


class Stop(TrainerCallback):
    """Ends the run after the current step, with a checkpoint, on a signal or at the time limit.

    A second signal ends it at once, unless it is a repeat of the first one.

    reason  why this rank or another one stops, once all ranks have agreed; None before
    """

    def __init__(self, *, deadline: float | None, limit: str) -> None:
        """deadline is in time.monotonic(); limit is the setting that caused it, as the user wrote it"""
        self.received: int | None = None
        self._received_at = 0.0
        self.reason: str | None = None
        self._deadline, self._limit = deadline, limit
        self._handlers_before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this rank should stop."""
        return self.received is not None or self._time_is_over()

    def _time_is_over(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = number, now
        elif number != self.received or now - self._received_at > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt(signal.Signals(number).name)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals only to the main thread; there, the program that called train() decides
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores HUP, so that a run outlives its terminal
                self._handlers_before[number] = signal.signal(number, self._receive)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if on_any_rank(self.requested, args) and state.global_step < state.max_steps:
            self.stop_here(control)

    def stop_here(self, control: TrainerControl) -> None:
        """End the run after this step, with a checkpoint. All ranks must call this, or none."""
        if self.received is not None:
            self.reason = f"{signal.Signals(self.received).name} received"
        elif self._time_is_over():
            self.reason = f"the time limit is reached ({self._limit})"
        else:
            self.reason = "another rank was told to stop"
        control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cancel what is due at an epoch's end if the run stops within the epoch, which the Trainer then ends early."""
        if self.reason is not None and state.epoch != round(state.epoch):
            control.should_log = control.should_evaluate = control.should_save = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._handlers_before.clear()


class BeforeFirstStep(TrainerCallback):
    """Calls a function before the first step, after a resumed run's state is loaded."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.action()


class LogBeforeSaving(TrainerCallback):
    """Logs the losses since the last log before each checkpoint and at the end, so that none is missing there.

    After an evaluation the step may be saved as the best one, or the run may end early, so it is logged before that.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save or control.should_evaluate or state.global_step >= state.max_steps:
            control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save or control.should_evaluate:
            control.should_log = True


class EarlyStopping(TrainerCallback):
    """Ends the run after `patience` evaluations in a row without a lower held-out loss, counted in the log.

    patience  0: never
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def is_due(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the Trainer's log has at least `patience` evaluations after the best one."""
        losses = [loss for step, loss in logged(history, "eval_loss").items() if step > 0]
        return bool(self.patience and losses) and len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_due(state.log_history):
            control.should_training_stop = True


class LossSpikeWarning(TrainerCallback):
    """Gives a notice if the loss jumps far above its earlier values."""

    #: How many logs are kept; how many are needed to recognise a jump; how many jumps are reported.
    REMEMBERED, KNOWN, WARNINGS = 20, 10, 5

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.notice, self._warnings = notice, 0
        self._losses: deque[float] = deque(maxlen=self.REMEMBERED)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if len(self._losses) >= self.KNOWN and self._warnings < self.WARNINGS:
            median = statistics.median(self._losses)
            spread = statistics.median(abs(earlier - median) for earlier in self._losses)
            if loss > 1.5 * median and loss - median > 6 * spread:
                self._warnings += 1
                self.notice(
                    f"the loss jumped to {loss:.3f} at step {state.global_step:,}; it was {median:.3f} "
                    f"(median of {len(self._losses)} logs). A lower --learning_rate or --max_grad_norm may help."
                )
        self._losses.append(loss)


class GradientCheck(TrainerCallback):
    """Gives a notice at the first step naming the adapter layers without a gradient, which would never learn."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.notice, self._done = notice, False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self._done:
            return
        # While B is zero, A's gradient is zero too, so only B's is checked.
        gradients = {name: weight.grad for name, weight in model.named_parameters() if "lora_B" in name}
        if not all(bool(torch.isfinite(local(grad)).all()) for grad in gradients.values() if grad is not None):
            return  # NaN spreads to every layer, so it shows nothing
        self._done = True
        without = sorted(
            name.partition(".lora_B")[0]
            for name, gradient in gradients.items()
            if gradient is None or not bool(local(gradient).any())
        )
        if without:
            self.notice(
                f"no gradient reaches {len(without)} of {len(gradients)} adapter layers in the first step:\n"
                f"{listing(without, 5)}"
            )
