"""`atomtune train` without flags, the first command of a new user."""

import json

import pytest

from atomtune.cli import main
from atomtune.settings.read import DEMO_FOLDER


@pytest.mark.slow
def test_the_demo_learns_its_persona(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train"]) == 0
    said = capsys.readouterr().out
    assert "Prompts that are not in the training data" in said
    assert said.count("小原") > 2, "the persona after; two references name it"
    assert "我是一个语言模型" in said, "the bland base before"
    assert "runs/demo-1" in said and "atomtune chat" in said
    record = json.loads((tmp_path / "runs" / "demo-1" / "run.json").read_text())
    losses = [entry["loss"] for entry in record["loss_history"]]
    assert losses[-1] < 0.2 * losses[0]
    assert record["records_used"] == record["records_read"] > 300


def test_the_demos_held_out_prompts_are_not_in_its_training_data():
    def prompts(name: str) -> set[tuple[str, str]]:
        lines = (DEMO_FOLDER / name).read_text(encoding="utf-8").splitlines()
        return {(record["instruction"], record["input"]) for record in map(json.loads, lines)}

    assert len(prompts("held_out.jsonl")) == 3
    assert not prompts("held_out.jsonl") & prompts("persona.jsonl")


def test_the_shipped_base_is_small():
    assert sum(file.stat().st_size for file in (DEMO_FOLDER / "base").iterdir()) <= 5_000_000


def test_a_second_demo_takes_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo-1").mkdir(parents=True)
    assert main(["train", "--max_steps", "3"]) == 0
    assert (tmp_path / "runs" / "demo-2" / "adapter_model.safetensors").exists()
