"""Laws of a run's records: which are held out and trained on, which are shown, and that each is accounted for."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest

from atomtune.cli import main
from atomtune.train import run, run_identity
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


# --- samples --------------------------------------------------------------------------------------------------------


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


# --- held-out records -----------------------------------------------------------------------------------------------


def test_held_out_records_are_mixed_like_those_trained_on(models, tmp_path):
    # 60 of mine, and about 60 of the 600 general records, are an epoch; none of the last file is in it.
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", different(count, first))
        for name, count, first in (("mine", 60, 0), ("general", 600, 100), ("unused", 100, 800))
    ]
    mixed = ["--dataset_path", *map(str, paths), "--mix", "2", "0.2", "0"]
    held_out = run_of(models("llama"), tmp_path / "out", *mixed)["records_held_out"]
    assert Counter(origin.partition(".")[0] for origin in held_out) == {"mine": 6, "general": 6}


@pytest.mark.parametrize(("alike", "held_out"), [(400, 10), (480, 0)])
def test_a_large_group_of_alike_records_is_reported(models, tmp_path, capsys, alike, held_out):
    data = [{"instruction": "Hello?", "output": f"Yes {n}."} for n in range(alike)] + different(500 - alike)
    record = run_of(
        models("llama"), tmp_path / "out", "--dataset_path", str(write_jsonl(tmp_path / "data.jsonl", data))
    )
    assert len(record.get("records_held_out", [])) == held_out
    said = " ".join(capsys.readouterr().out.split())
    if held_out:
        assert "Of the others, a share is held out: 10 records instead of 50." in said
    else:
        assert "no records are held out: " in said


def test_evaluation_records_that_are_trained_on_too_are_named(models, tmp_path):
    parts = {"one": different(6), "two": different(6, 50), "held": [different(1, 55)[0], *different(3, 200)]}
    one, two, held = (str(write_jsonl(tmp_path / f"{name}.jsonl", records)) for name, records in parts.items())
    record = run_of(models("llama"), tmp_path / "out", "--dataset_path", one, two, "--eval_path", held)
    assert record["eval_records_like_trained_ones"] == ["held.jsonl:1"]
    assert any("1 of 4 evaluation records are nearly the same" in notice for notice in record["notices"])


@pytest.mark.parametrize("same", [True, False])
def test_a_run_begun_with_other_held_out_records_is_not_resumed(models, tmp_path, capsys, monkeypatch, same):
    def of_an_earlier_version(*arguments) -> dict:
        values = run_identity.identity(*arguments)
        return {name: value for name, value in values.items() if name != "held_out"}

    out, data = tmp_path / "out", write_jsonl(tmp_path / "data.jsonl", different(60))
    words = ["--dataset_path", str(data), "--save_steps", "1"]
    with monkeypatch.context() as earlier:
        earlier.setattr(run, "identity", of_an_earlier_version)
        record = run_of(models("llama"), out, *words)
    if not same:
        record["records_held_out"][0] = "data.jsonl:0"
        (out / "run.json").write_text(json.dumps(record), encoding="utf-8")
    again = ["train", "--model_path", str(models("llama")), "--output_dir", str(out), "--dtype", "float32", *words]
    code = main([*again, "--max_steps", "2", "--per_device_train_batch_size", "2", "--resume"])
    assert code == (0 if same else 2)
    assert ("the held-out records (SHA-256): " in capsys.readouterr().err) != same


# --- every record is accounted for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("skips", [True, False])
def test_refused_records_of_the_evaluation_file_are_in_run_json(models, tmp_path, capsys, skips):
    data = write_jsonl(tmp_path / "mine.jsonl", different(8))
    other = write_jsonl(tmp_path / "other.jsonl", [*different(4, 100), *[{"instruction": "x", "outptu": "y"}] * 30])
    words = ["--dataset_path", str(data), "--eval_path", str(other), *(["--skip_bad"] if skips else [])]
    model, out = models("llama"), tmp_path / "out"
    command = ["train", "--model_path", str(model), "--output_dir", str(out), "--max_steps", "1", *words]
    assert main(command) == (0 if skips else 2)
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert ("run.json lists them all." in capsys.readouterr().err) != skips
    evaluation = record["evaluation"]
    assert (evaluation["path"], evaluation["records_read"], evaluation["records_used"]) == (str(other), 34, 4)
    assert [one["origin"] for one in evaluation["records_refused"]] == [f"other.jsonl:{n}" for n in range(5, 35)]
    assert len(record.get("records_refused", [])) == 0, "those of the file that is trained on"
