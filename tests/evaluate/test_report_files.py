"""The files of a report: none is lost, and none replaces that of another evaluation."""

import json
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from atomtune.evaluate.report_files import beside_others
from tests.conftest import DIALOGUES, write_jsonl
from tests.evaluate.evaluated import evaluate, report_in


def test_reports_that_cannot_be_written_in_the_end_are_kept_elsewhere(by_heart, dialogues, tmp_path, capsys):
    """A disk that filled up while the answers were generated, which takes hours, cost all of them."""
    out = tmp_path / "out"
    (out / "report.json").mkdir(parents=True)  # nothing can be written under this name
    flags = ["--adapter_path", str(by_heart), "--dataset_path", str(dialogues), "--records", "2", "--no_probe"]
    assert evaluate(*flags, "--no_generate", "--output_dir", str(out)) == 3
    told = capsys.readouterr().err
    assert f"{out}: the reports cannot be written there: " in told
    kept = Path(re.search(r"They are in (\S+) instead", told).group(1))
    assert report_in(kept)["records"] == 2 and (kept / "report.html").is_file()
    shutil.rmtree(kept)


def test_a_full_disk_is_reported_before_the_base_is_loaded(by_heart, dialogues, tmp_path, capsys):
    """An empty file can be made on a disk with no room for a single byte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        flags = ["--adapter_path", str(by_heart), "--dataset_path", str(dialogues), "--no_generate", "--no_probe"]
        assert evaluate(*flags, "--output_dir", str(tmp_path / "out")) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capsys.readouterr()
    assert f"--output_dir {tmp_path / 'out'} cannot be written: File too large. Pass another one." in told.err
    assert "loading" not in told.out


def test_only_a_report_of_the_same_evaluation_is_replaced(by_heart, tmp_path):
    """Regression: an evaluation of other records in a file of the same name replaced one that may have taken hours."""
    adapter = Path(shutil.copytree(by_heart, tmp_path / "out"))
    flags = ["--adapter_path", str(adapter), "--dataset_path", str(tmp_path / "data.jsonl"), "--no_probe"]
    for folder, records, words in (
        ("evaluation", DIALOGUES[:2], ["--no_generate"]),
        ("evaluation-1", DIALOGUES[2:4], ["--no_generate"]),  # other bytes
        ("evaluation-2", DIALOGUES[2:4], ["--no_generate", "--records", "1"]),
        ("evaluation-3", DIALOGUES[2:4], ["--max_new_tokens", "4"]),  # generated answers
        ("evaluation-4", DIALOGUES[2:4], ["--max_new_tokens", "5"]),
        ("evaluation-5", DIALOGUES[2:4], ["--no_generate", "--seed", "7"]),
        ("evaluation-1", DIALOGUES[2:4], ["--no_generate", "--per_device_eval_batch_size", "1"]),
    ):
        write_jsonl(tmp_path / "data.jsonl", records)
        (adapter / folder / "report.md").unlink(missing_ok=True)
        assert evaluate(*flags, *words) == 0
        assert (adapter / folder / "report.md").exists(), words
    assert len(list(adapter.glob("evaluation*"))) == 6


def test_a_report_that_differs_in_what_it_was_made_from_is_kept(by_heart, dialogues, tmp_path):
    folder = tmp_path / "evaluation"
    words = ["--adapter_path", str(by_heart), "--dataset_path", str(dialogues), "--output_dir", str(folder)]
    assert evaluate(*words, "--no_generate", "--no_probe", "--records", "1") == 0
    made = report_in(folder)
    same = SimpleNamespace(to_json=lambda: made)
    made_from = ("base", "adapters", "data", "data_sha256", "held_out", "records", "stopped_early", "settings")
    for key, place in (("written", "evaluation"), *((key, "evaluation-1") for key in made_from)):
        (folder / "report.json").write_text(json.dumps({**made, key: "another"}))
        assert beside_others(folder, same).name == place, key


def test_the_report_of_another_adapter_of_the_same_name_is_not_replaced(by_heart, dialogues, tmp_path):
    first, second, barely = (Path(shutil.copytree(by_heart, tmp_path / place)) for place in ("first", "a/b", "c/b"))
    weights = load_file(barely / "adapter_model.safetensors")
    halved = {name: tensor / 2 for name, tensor in weights.items()}
    save_file(halved, barely / "adapter_model.safetensors", metadata={"format": "pt"})
    more = ["--dataset_path", str(dialogues), "--records", "2", "--no_generate", "--no_probe"]
    for other in (second, barely):
        assert evaluate("--adapter_path", str(first), str(other), *more) == 0
    figures = [report_in(first / folder)["models"]["b"] for folder in ("evaluation", "evaluation-1")]
    assert figures[0] != figures[1]


@pytest.mark.parametrize(
    "old", ["{}", '{"base": "b", "data": ["data.jsonl"], "models": {"base": {}}}', '{"models": 5}']
)
def test_a_report_that_does_not_say_what_it_was_made_from_is_kept(old, by_heart, tmp_path):
    adapter = Path(shutil.copytree(by_heart, tmp_path / "out"))
    (adapter / "evaluation").mkdir()
    (adapter / "evaluation" / "report.json").write_text(old)
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES[:1])
    assert evaluate("--adapter_path", str(adapter), "--dataset_path", str(data), "--no_generate", "--no_probe") == 0
    assert (adapter / "evaluation" / "report.json").read_text() == old
    assert report_in(adapter / "evaluation-1")["records"] == 1
