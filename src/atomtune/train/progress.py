"""Progress: the line of figures while a run trains, as a bar in a terminal and as lines elsewhere."""

import time
from typing import Any

from rich.progress import TaskID
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atomtune.console import Console, progress_bar
from atomtune.train.callbacks import WorkCounter

SPOKEN_EVERY = 5.0  # seconds between lines where there is no terminal to draw a bar in


class TrainingBar(TrainerCallback):
    """Steps, loss, examples/s, tokens/s and time left: a bar in a terminal, lines elsewhere."""

    def __init__(self, console: Console, work: WorkCounter) -> None:
        self.console, self.work = console, work
        self.progress = progress_bar(console, "{task.fields[rate]}", "{task.fields[loss]}")
        self.task: TaskID | None = None
        self.loss = ""
        self.first_step = self.first_examples = self.first_tokens = 0
        self.began = self.spoken = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = time.perf_counter()
        self.first_step = state.global_step
        self.first_examples, self.first_tokens = self.work.examples, self.work.tokens_computed
        self.task = self.progress.add_task(
            "train", total=state.max_steps, completed=state.global_step, rate="", loss=""
        )
        self.progress.start()

    def _rate(self) -> str:
        seconds = max(time.perf_counter() - self.began, 1e-6)
        examples = (self.work.examples - self.first_examples) / seconds
        return f"{examples:.1f} ex/s {(self.work.tokens_computed - self.first_tokens) / seconds:,.0f} tok/s"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step, rate=self._rate(), loss=self.loss)

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
            self.console.print(f"step {state.global_step:,}  eval loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        self.loss = f"loss {logs['loss']:.3f}"
        now = time.perf_counter()
        if not self.console.is_terminal and (now - self.spoken > SPOKEN_EVERY or state.global_step == state.max_steps):
            self.spoken = now
            done = state.global_step - self.first_step
            left = (state.max_steps - state.global_step) * (now - self.began) / max(done, 1)
            self.console.print(
                f"step {state.global_step:,}/{state.max_steps:,}  loss {logs['loss']:.4f}  "
                f"lr {logs.get('learning_rate', 0):.2e}  {self._rate()}  left {_clock(left)}",
                soft_wrap=True,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        self.progress.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
