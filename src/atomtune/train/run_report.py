"""The run's record: run.json, loss.png, and the line of figures while it trains."""

import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TaskID
from transformers import TrainerCallback

from atomtune import __version__
from atomtune.train.checkpoint.start import RECORD
from atomtune.train.checkpoint.atomic import write_json
from atomtune.train.callbacks import WorkCounter
from atomtune.console import bar

LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "safetensors")
SPOKEN_EVERY = 5.0  # seconds between lines where there is no terminal to draw a bar in


class RunRecord:
    """run.json, kept true from the first moment: a reader finds `running` or how it ended."""

    def __init__(self, folder: Path, *, writes: bool = True, waits: bool = False) -> None:
        self.folder, self.writes, self.waits = folder, writes, waits
        self.values: dict[str, Any] = {
            "status": "running",
            "atomtune": __version__,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
            "machine": platform.machine(),
            "notices": [],
        }

    def update(self, **values: Any) -> None:
        self.values |= values
        self.values["updated"] = datetime.now(UTC).isoformat(timespec="seconds")
        if self.writes and not self.waits:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / RECORD, self.values)

    def begin(self) -> None:
        """From here on this run's record stands in the folder, in place of an earlier one."""
        self.waits = False
        self.update()


class TrainingBar(TrainerCallback):
    """Steps, loss, examples/s, tokens/s and time left: a bar in a terminal, lines elsewhere."""

    def __init__(self, console: Console, work: WorkCounter) -> None:
        self.console, self.work = console, work
        self.progress = bar(console, "{task.fields[rate]}", "{task.fields[loss]}")
        self.task: TaskID | None = None
        self.loss = ""
        self.first_step = self.first_examples = self.first_tokens = 0
        self.began = self.spoken = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step, rate=self._rate(), loss=self.loss)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
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

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        self.progress.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def draw_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Training and evaluation loss over steps, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.6, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per target token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, format="png")
    pyplot.close(figure)
    beside.replace(path)
