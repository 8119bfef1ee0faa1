"""Hub upload: what reaches the hub, with the hub's calls replaced by a record of the files they would send."""

import json
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi

from atomtune.cli import main

TOKEN = "hf_notForTheHub"


class Hub:
    """The uploads a run made: (place in the repository, files, their bytes)."""

    def __init__(self) -> None:
        self.uploads: list[tuple[str, dict[str, bytes]]] = []
        self.error: Exception | None = None

    def upload_folder(self, *, folder_path: Path, path_in_repo: str = "", **options: Any) -> "Future[None]":
        job: Future[None] = Future()
        if self.error is not None:
            job.set_exception(self.error)
            return job
        names = [file for file in Path(folder_path).rglob("*") if file.is_file()]
        patterns = options.get("allow_patterns") or ["*"]
        files = {
            name: file.read_bytes()
            for file in names
            if any(fnmatch(name := file.relative_to(folder_path).as_posix(), pattern) for pattern in patterns)
        }
        self.uploads.append((path_in_repo, files))
        job.set_result(None)
        return job


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(HfApi, "whoami", lambda *args, **kwargs: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: SimpleNamespace(repo_id="me/tuned"))
    monkeypatch.setattr(HfApi, "upload_folder", hub.upload_folder)
    return hub


@pytest.fixture
def pushed(models, dialogues, tmp_path):
    """A function that trains for four steps with --push_to_hub and returns the exit code and the output folder."""

    def train(*flags: str) -> tuple[int, Path]:
        out = tmp_path / "tuned"
        words = ["--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--output_dir", str(out)]
        hub_words = ["--push_to_hub", "--hub_token", TOKEN, "--max_steps", "4", "--save_steps", "2"]
        return main(["train", *words, *hub_words, *flags]), out

    return train


@pytest.mark.parametrize(
    ("strategy", "places"),
    [("end", [""]), ("every_save", ["", "", ""]), ("checkpoint", ["", "last-checkpoint", "", "last-checkpoint", ""])],
)
def test_each_strategy_sends_the_adapter_and_no_token(hub, pushed, capsys, strategy, places):
    # Regression: the Trainer sent its own README.md, run.json and a pickle with the token in it.
    code, out = pushed("--hub_strategy", strategy)
    assert code == 0
    assert [place for place, _ in hub.uploads] == places
    assert not any(TOKEN.encode() in content for _, files in hub.uploads for content in files.values())
    _, adapter = hub.uploads[-1]
    assert {"adapter_model.safetensors", "adapter_config.json", "atomtune.json", "README.md"} <= adapter.keys()
    assert adapter.keys().isdisjoint({"run.json", "report.html", "training_args.bin"})
    assert all(content == (out / name).read_bytes() for name, content in adapter.items())
    assert b"# A LoRA adapter for" in adapter["README.md"]
    assert "uploaded: https://huggingface.co/me/tuned" in capsys.readouterr().out


def test_a_checkpoint_on_the_hub_has_all_that_resuming_needs(hub, pushed):
    _, out = pushed("--hub_strategy", "all_checkpoints")
    sent = dict(upload for upload in hub.uploads if upload[0])
    assert sent.keys() == {"checkpoint-2", "checkpoint-4"}
    kept = {file.name: file.read_bytes() for file in (out / "checkpoint-4").iterdir()}
    assert sent["checkpoint-4"] == kept


def test_a_failed_upload_leaves_a_finished_run_and_the_command_to_repeat_it(hub, pushed, capsys):
    hub.error = OSError("connection reset")
    code, out = pushed()
    assert code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the adapter could not be uploaded to me/tuned: connection reset" in said
    assert f"hf upload me/tuned {out} . --include=" in said
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
