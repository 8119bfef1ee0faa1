"""A tiny base with adapters that know their records by heart."""

from pathlib import Path

import pytest

from atomtune.cli import main
from tests.conftest import DIALOGUES, write_jsonl


def train_by_heart(model: Path, folder: Path, records: list[dict], *, steps: int = 120) -> Path:
    """A run that learns these records; its output folder."""
    data = write_jsonl(folder / "data.jsonl", records)
    flags = ["--model_path", str(model), "--dataset_path", str(data), "--output_dir", str(folder / "out")]
    learning = ["--max_steps", str(steps), "--learning_rate", "1e-2", "--lora_rank", "16", "--lora_dropout", "0"]
    assert main(["train", *flags, *learning, "--dtype", "float32"]) == 0
    return folder / "out"


@pytest.fixture(scope="session")
def by_heart(models, tmp_path_factory) -> Path:
    """An adapter on the tiny llama that has learned the dialogues."""
    return train_by_heart(models("llama"), tmp_path_factory.mktemp("by_heart"), DIALOGUES)
