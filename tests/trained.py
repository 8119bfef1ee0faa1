"""Tiny runs whose adapters know their records by heart, so that answers can be told apart."""

from collections.abc import Callable
from pathlib import Path

from atomtune.cli import main
from tests.conftest import numbered_dialogues, write_jsonl


def train_by_heart(model: Path, folder: Path, records: list[dict], *more: str, steps: int = 120) -> Path:
    """A run that learns these records; its output folder."""
    data = write_jsonl(folder / "data.jsonl", records)
    flags = ["--model_path", str(model), "--dataset_path", str(data), "--output_dir", str(folder / "out")]
    learning = ["--max_steps", str(steps), "--learning_rate", "1e-2", "--lora_rank", "16", "--lora_dropout", "0"]
    assert main(["train", *flags, *learning, "--dtype", "float32", *more]) == 0
    return folder / "out"


def whole_run(folder: Path, command: Callable[[Path, Path], list[str]]) -> tuple[Path, Path]:
    """A file of the numbered dialogues, and the folder of the undisturbed run that `command(file, folder)` makes."""
    data = write_jsonl(folder / "dialogues.jsonl", numbered_dialogues())
    assert main(command(data, folder / "whole")) == 0
    return data, folder / "whole"
