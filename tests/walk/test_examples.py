"""Everything in examples/ runs, at toy size; the tutorial's own command line runs as it stands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atomtune.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_an_example_file_runs(path, models, dialogues, tmp_path):
    if path.stem == "atom-7b-24gb":
        pytest.importorskip("bitsandbytes")
    own = ["--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--output_dir", str(tmp_path)]
    held_out = ["--eval_size", "4"] if "eval_size" in path.read_text() else []
    assert main(["train", str(path), *own, "--max_steps", "2", *held_out]) == 0
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_train_sh_runs(models, dialogues, tmp_path):
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    places = {"MODEL": str(models("lone")), "DATASET": str(dialogues), "OUTPUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", str(EXAMPLES / "train.sh"), "--max_steps", "2"],
        env={**os.environ, **places, "PATH": binaries},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["records_used"] == record["records_read"] == 40
    assert "--fp16" in done.stdout, "what becomes of --fp16 on a CPU is said"
