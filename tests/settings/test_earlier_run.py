"""Earlier run: which settings `--resume` without a model takes from the run's run.json."""

import json

import pytest

from atomtune.errors import BadSettings
from atomtune.settings.read import read_plan, read_train

RECORDED = {
    "model_path": {"value": "base", "source": "--model_path"},
    "dataset_path": {"value": ["a.jsonl"], "source": "run.yaml:2"},
    "lora_rank": {"value": 16, "source": "train()"},
    "learning_rate": {"value": 9e-3, "source": "auto: by the width of the base, 192"},
    "lora_alpha": {"value": 5.0, "source": "default"},
    "save_total_limit": {"value": 7, "source": "atomtune's default"},
    "trust_remote_code": {"value": True, "source": "--trust_remote_code"},
    "hub_token": {"value": "(not kept)", "source": "--hub_token"},
    "resume_from_checkpoint": {"value": "elsewhere", "source": "--resume_from_checkpoint"},
    "of_a_later_version": {"value": 1, "source": "--of_a_later_version"},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"settings": RECORDED}), encoding="utf-8")
    return tmp_path


def test_resume_takes_explicit_settings_of_the_run_except_per_command_ones(folder):
    told: list[str] = []
    settings = read_train(["--resume", "--output_dir", str(folder)], notice=told.append)
    assert settings.model.model_path == "base" and settings.data.dataset_paths == ["a.jsonl"]
    assert settings.lora.lora_rank == 16
    assert settings.origins["lora_rank"] == str(folder / "run.json") and not settings.demo
    assert "learning_rate" not in settings.origins and settings.lora.lora_alpha == 32
    assert settings.trainer["save_total_limit"] == 3 and not settings.model.trust_remote_code
    assert "hub_token" not in settings.origins and settings.run.resume_from_checkpoint is None
    assert str(folder / "run.json") in told[-1]


def test_the_command_wins_and_may_name_a_base_that_was_moved(folder):
    words = ["--resume", "--output_dir", str(folder), "--lora_rank", "4", "--model_path", "moved"]
    settings = read_train(words)
    assert settings.model.model_path == "moved" and settings.data.dataset_paths == ["a.jsonl"]
    assert settings.lora.lora_rank == 4


def test_train_called_from_python_takes_the_runs_settings_too(folder):
    assert read_train({"resume": True, "output_dir": str(folder)}).lora.lora_rank == 16


def test_plan_with_resume_takes_the_runs_settings(folder):
    assert read_plan(["--resume", "--output_dir", str(folder)]).train.lora.lora_rank == 16


def test_resume_false_takes_no_settings_of_the_run(folder):
    assert read_train({"resume": False, "output_dir": str(folder)}).demo


@pytest.mark.parametrize("words", [["--model_path", "b", "--dataset_path", "d.jsonl", "--resume"], []])
def test_a_complete_command_or_a_new_run_takes_no_earlier_settings(folder, words):
    assert str(folder / "run.json") not in read_train([*words, "--output_dir", str(folder)]).origins.values()


@pytest.mark.parametrize("text", [None, "{", "[]", '{"settings": []}'])
def test_a_missing_or_damaged_run_json_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "run.json").write_text(text, encoding="utf-8")
    words = ["--resume", "--output_dir", str(tmp_path)]
    with pytest.raises(BadSettings, match="no settings of a run in"):  # it trained the demo in a mistyped folder
        read_train(words)
    with pytest.raises(BadSettings, match="given without --dataset_path"):
        read_train([*words, "--model_path", "base"])


def test_a_run_json_with_malformed_settings_falls_back_to_the_demo(tmp_path):
    (tmp_path / "run.json").write_text('{"settings": {"lora_rank": 3, "lora_alpha": {"value": 2}}}', encoding="utf-8")
    assert read_train(["--resume", "--output_dir", str(tmp_path)]).demo
