"""The live line of a run: at any width, no figure is cut off."""

import io

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from atomtune.console import Console
from atomtune.train.callbacks import WorkCounter
from atomtune.train.progress import TrainingBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (40, ["12/200", "loss 6.553"]),
        (60, ["12/200", "loss 6.553", "held-out 6.125"]),
        (80, ["12/200", "loss 6.553", "held-out 6.125", "ex/s"]),
        (120, ["12/200", "loss 6.553", "held-out 6.125", "examples/s", "tokens/s"]),
    ],
)
def test_a_narrower_terminal_shows_fewer_figures_but_truncates_none(tmp_path, monkeypatch, width, shown):
    monkeypatch.setenv("TERM", "xterm")
    console = Console()
    console.file, console.width = Terminal(), width
    bar = TrainingBar(console, WorkCounter())
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, eval_strategy="no")
    state, control = TrainerState(max_steps=200), TrainerControl()
    bar.on_train_begin(args, state, control)
    state.global_step, state.log_history = 12, [{"eval_loss": 6.125, "step": 8}]
    bar.on_log(args, state, control, logs={"eval_loss": 6.125})
    bar.on_log(args, state, control, logs={"loss": 6.553})
    bar.on_step_end(args, state, control)
    bar.close()
    with console.capture() as captured:
        console.print(bar.progress.get_renderable())
    (line,) = captured.get().splitlines()
    assert "…" not in line and line.rstrip().endswith("left")
    assert all(figure in line for figure in shown), line
    assert len(line.rstrip()) <= width
