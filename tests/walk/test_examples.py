"""Everything in examples/ runs at toy size, and the tutorial's own command line runs unchanged."""

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_notebook_runs_cell_by_cell(tmp_path):
    """Its code cells, run one after another in a new process, as a kernel would."""
    notebook = json.loads((EXAMPLES / "library.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    program = f"names = {{}}\nfor cell in {cells!r}:\n    exec(compile(cell, 'cell', 'exec'), names)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "359 records" in done.stdout and "held-out loss" in done.stdout and "Better: " in done.stdout


@pytest.mark.parametrize("name", ["share_prefixes_peft", "share_prefixes_trl"])
def test_sharing_prefixes_takes_at_most_fifteen_lines(name):
    # tests/test_own_loop.py compares their results with padded loops.
    lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").partition('"""\n\n')[2].splitlines()
    imports = ("import ", "from ")
    assert 0 < len([line for line in lines if line.strip() and not line.startswith(imports)]) <= 15
