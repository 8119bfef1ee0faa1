"""Disk space: a run that cannot save is refused before its first step, and one that may run out is told so."""

import re
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from atomtune.cli import main
from atomtune.console import Console
from atomtune.errors import RunFailed
from atomtune.train import disk_space
from atomtune.train.disk_space import check_space

Usage = namedtuple("Usage", "free")
#: Bytes of a trained matrix of 1,000 x 1,000 numbers in float32.
WEIGHTS = 4_000_000


@pytest.fixture
def said_of(tmp_path, monkeypatch, capsys):
    """(free bytes, settings of the Trainer) → (what is printed, notices), for an adapter of WEIGHTS bytes."""

    def check(free: int, **values: Any) -> tuple[str, list[str]]:
        settings = {"save_strategy": "steps", "save_total_limit": 3, "save_only_model": False, **values}
        run: Any = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path), **settings), console=Console())
        model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False))
        model[1].requires_grad_(False)  # a frozen matrix is not saved
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: Usage(free))
        monkeypatch.setattr(disk_space, "tokenizer_text", lambda tokenizer: "")
        check_space(run, model, tokenizer=None)
        return capsys.readouterr().out, run.console.notices

    return check


# A checkpoint has the weights and Adam's two moments of them; the adapter at the end has the weights.
@pytest.mark.parametrize(
    ("settings", "least"),
    [({}, 4 * WEIGHTS), ({"save_only_model": True}, 2 * WEIGHTS), ({"save_strategy": "no"}, 0)],
)
def test_a_run_whose_first_checkpoint_and_adapter_do_not_fit_is_refused(said_of, settings, least):
    said_of(least + 200_000, **settings)
    if least:
        with pytest.raises(RunFailed, match="The disk is full: a checkpoint takes about"):
            said_of(least, **settings)


# As many checkpoints as are kept, one more while it is written, and the adapter at the end.
@pytest.mark.parametrize(("limit", "needed"), [(3, 13 * WEIGHTS), (1, 7 * WEIGHTS), (None, 7 * WEIGHTS)])
def test_too_little_space_for_all_checkpoints_is_reported(said_of, limit, needed):
    _, notices = said_of(needed, save_total_limit=limit)
    assert len(notices) == 1 and f"; {limit or 'all'} are kept; " in notices[0]
    assert said_of(needed + 400_000, save_total_limit=limit)[1] == []


def test_space_is_only_mentioned_if_the_checkpoints_take_more_than_a_tenth(said_of):
    assert said_of(9 * 13 * WEIGHTS)[0].startswith("A checkpoint takes about 12.1 MB; 3 are kept; 468.0 MB are free")
    assert said_of(11 * 13 * WEIGHTS) == ("", [])


def test_a_checkpoint_is_not_larger_than_announced(models, dialogues, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: Usage(10**6))
    out = tmp_path / "out"
    words = ["--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--output_dir", str(out)]
    assert main(["train", *words, "--max_steps", "1", "--save_steps", "1"]) == 0
    printed = re.search(r"A checkpoint takes about ([\d.]+) kB", " ".join(capsys.readouterr().out.split()))
    assert printed is not None
    announced = 1000 * float(printed[1])
    files = [file for file in Path(out / "checkpoint-1").rglob("*") if file.is_file()]
    actual = sum(file.stat().st_size for file in files)
    assert actual <= announced <= 1.5 * actual
