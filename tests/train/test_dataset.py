"""Laws of a run's records: which are held out and trained on, which are shown, and that each is accounted for."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest

from atomtune.cli import main
from tests.conftest import write_jsonl


def different(count: int, first: int = 0) -> list[dict]:
    """Records of which no two are near-duplicates."""
    words = ["lamp", "boat", "tea", "gull", "rope", "fog"]
    return [
        {
            "instruction": f"{n * 7919 % 1009} {words[n % 6]} {n * n} {words[n // 6 % 6]}?",
            "output": f"{words[n // 36 % 6]} {n * 31} and {words[n % 5]} {n}.",
        }
        for n in range(first, first + count)
    ]


def run_of(model: Path, out: Path, *words: str) -> dict:
    """The run.json of one step of training with these settings."""
    short = ["--dtype", "float32", "--max_steps", "1", "--per_device_train_batch_size", "2"]
    assert main(["train", "--model_path", str(model), "--output_dir", str(out), *short, *words]) == 0
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch) -> str:
    """The name of a data set that `datasets` loads as if from the hub: it finds the repository in this folder."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(different(60)).to_parquet(folder / "train.parquet")
    monkeypatch.chdir(tmp_path)
    return "owner/name:default"


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["--dataset_path", "--eval_path"])
def test_records_of_a_hub_data_set_are_held_out_and_shown(models, tmp_path, on_the_hub, use):
    words = [use, on_the_hub]
    if use == "--eval_path":
        words += ["--dataset_path", str(write_jsonl(tmp_path / "mine.jsonl", different(8, 100)))]
    record = run_of(models("llama"), tmp_path / "out", *words)
    assert record["status"] == "finished" and len(record["samples"]) == 3
    asked = {row["instruction"]: row["output"] for row in different(60)}
    assert all(asked[sample["prompt"]] == sample["reference"] for sample in record["samples"])
    if use == "--dataset_path":
        assert all(origin.startswith(f"{on_the_hub}:") for origin in record["records_held_out"])
        evaluate = ["evaluate", "--adapter_path", str(tmp_path / "out"), "--no_generate", "--no_probe"]
        assert main(evaluate) == 0


def test_a_file_named_twice_is_trained_on(models, tmp_path):
    data = str(write_jsonl(tmp_path / "a.jsonl", different(60)))
    record = run_of(models("llama"), tmp_path / "out", "--dataset_path", data, data)
    assert record["status"] == "finished" and len(record["samples"]) == 3
    assert set(Counter(record["records_held_out"]).values()) == {2}, "a record and its copy are held out together"
