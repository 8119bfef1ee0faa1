"""Progress: figures of a running run: a bar in a terminal, lines elsewhere, and the picture of the loss."""

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.progress import TaskID
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atomtune.console import NARROW, WIDE, Console, progress_bar
from atomtune.language import translated
from atomtune.train.callbacks import WorkCounter
from atomtune.train.pace import Pace, evaluations_left
from atomtune.train.run_report import PICTURE, RunRecord, draw_loss, histories, logged

SPOKEN_EVERY = 5.0  # seconds between lines if there is no terminal for a bar
# Seconds between two updates of the step in run.json; evaluations and checkpoints are written at once
RECORDED_EVERY = 5.0
SHARE = 50  # at most one part in this many of a run's time goes into such updates
OTHER_FIGURES = 30  # columns beside the losses in a narrow terminal: `train 1200/9999 … 1:23:45 left`
DRAWN_EVERY = 20.0  # seconds between two drawings of loss.png, each of which takes a third of a second


class TrainingBar(TrainerCallback):
    """Steps, loss, examples/s, tokens/s and time left: a bar in a terminal, lines elsewhere."""

    def __init__(self, console: Console, work: WorkCounter) -> None:
        self.console, self.work = console, work
        rate = ["{task.fields[rate]}"] if console.width >= NARROW else []
        self.progress = progress_bar(console, *rate, "{task.fields[loss]}", left="{task.fields[left]}")
        self.pace = Pace()
        self.task: TaskID | None = None
        self.loss = self.held_out = ""
        self.first_examples = self.first_tokens = 0
        self.spoken = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pace.begin(state.global_step)
        self.first_examples, self.first_tokens = self.work.examples, self.work.tokens_computed
        self.task = self.progress.add_task(
            translated("train"), total=state.max_steps, completed=state.global_step, rate="", loss="", left="-:--"
        )
        self.progress.start()

    def _rate(self) -> str:
        """Examples and tokens per second; in a narrow terminal only examples."""
        seconds = self.pace.seconds()
        examples = (self.work.examples - self.first_examples) / seconds
        if self.console.draws and self.console.width < WIDE:
            return translated(f"{examples:.1f} ex/s")
        tokens = (self.work.tokens_computed - self.first_tokens) / seconds
        return translated(f"{examples:.1f} examples/s  {tokens:,.0f} tokens/s")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.pace.step_ended(state.global_step)
        if self.task is not None:
            self.progress.update(
                self.task,
                completed=state.global_step,
                rate=self._rate(),
                loss=self._losses(),
                left=self._left(args, state),
            )

    def _left(self, args: TrainingArguments, state: TrainerState) -> str:
        return _clock(self.pace.left(state.global_step, state.max_steps, evaluations_left(args, state)))

    def _losses(self) -> str:
        """Training and held-out loss; in a very narrow terminal only training loss."""
        loss = translated(f"loss {self.loss}") if self.loss else ""
        both = "  ".join(filter(None, (loss, self.held_out)))
        return both if cell_len(both) + OTHER_FIGURES <= self.console.width else loss

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            self.pace.evaluated(logs.get("eval_runtime", 0))
            losses = list(logged(state.log_history, "eval_loss").values())
            self.held_out = translated(f"held-out {losses[-1]:.3f}")
            self._say_evaluation(state, losses)
        if "loss" not in logs:
            return
        self.loss = f"{logs['loss']:.3f}"
        now = time.perf_counter()
        if not self.console.draws and (now - self.spoken > SPOKEN_EVERY or state.global_step == state.max_steps):
            self.spoken = now
            rate, left, learning_rate = self._rate(), self._left(args, state), logs.get("learning_rate", 0)
            line = translated(
                f"step {state.global_step:,}/{state.max_steps:,}  loss {logs['loss']:.4f}  "
                f"lr {learning_rate:.2e}  {rate}  left {left}"
            )
            self.console.print(line, soft_wrap=True)

    def _say_evaluation(self, state: TrainerState, losses: Sequence[float]) -> None:
        """Print a line that stays: the step, the training loss, and the held-out loss."""
        steps = f"{state.max_steps:,}"
        width = cell_len(translated(f"step {steps} of {steps}"))
        place = translated(f"step {state.global_step:>{len(steps)},} of {steps}")
        if not state.global_step:
            place = translated("before training")
        padding = " " * (width - cell_len(place))
        training = translated(f"loss {self.loss}") + "  " if self.loss else ""
        self.console.say(f"  {place}{padding}  {training}{held_out_words(losses)}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        self.progress.stop()


class RecordedProgress(TrainerCallback):
    """Keeps run.json up to date: the step, the planned steps and the losses so far.

    It is also updated at each checkpoint, so that run.json of a killed run shows what can be resumed.
    """

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self._next = -math.inf  # when to write the step again

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if time.monotonic() >= self._next:
            self._enter(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._enter(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._enter(state)

    def _enter(self, state: TrainerState) -> None:
        began = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk is reported when a checkpoint is saved
            self.record.update(steps=state.global_step, steps_planned=state.max_steps, **histories(state.log_history))
        took = time.monotonic() - began  # a second, if run.json lists a million refused records
        self._next = began + max(RECORDED_EVERY, took * SHARE)


class LossPicture(TrainerCallback):
    """Draws loss.png again after evaluations and saves during the run."""

    def __init__(self, folder: Path, *, title: str) -> None:
        self.folder, self.title = folder, title
        self._drawn = time.monotonic()

    def draw(self, state: TrainerState) -> None:
        draw_loss(state.log_history, self.folder / PICTURE, title=self.title)
        self._drawn = time.monotonic()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._draw_again(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._draw_again(state)

    def _draw_again(self, state: TrainerState) -> None:
        if state.is_world_process_zero and time.monotonic() - self._drawn >= DRAWN_EVERY:
            with contextlib.suppress(OSError):  # a full disk is reported when a checkpoint is saved
                self.draw(state)


def held_out_words(losses: Sequence[float]) -> str:
    """The last held-out loss, its direction, and whether it is the best: `held-out loss 0.322 ↓ best`."""
    last = losses[-1]
    text = translated(f"held-out loss {last:.3f}")
    if len(losses) == 1:
        return text
    arrow = "→"
    if last < losses[-2]:
        arrow = "↓"
    elif last > losses[-2]:
        arrow = "↑"
    best = " " + translated("best") if last < min(losses[:-1]) else ""
    return f"{text} {arrow}{best}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
