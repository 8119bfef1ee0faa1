"""A model with linear attention and one with experts and sinks train as a tree, are killed and
resumed.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from atomtune.cli import main
from tests.conftest import DIALOGUES, write_jsonl
from tests.hybrids import WALKED, write_walked

STEPS = 12
LONG = "You are a patient shopkeeper in an old town. Answer briefly, kindly and in the words of a story. " * 2


@pytest.fixture(scope="module", params=WALKED)
def trained(request, tmp_path_factory):
    """(family, base, command without output folder, output folder) of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp(request.param)
    base = write_walked(request.param, folder / "base")
    records = [{**record, "instruction": LONG, "input": f"{record['instruction']} {n}"} for n, record in numbered()]
    data = write_jsonl(folder / "dialogues.jsonl", records)
    command = ["train", "--model_path", str(base), "--dataset_path", str(data), "--dtype", "float32"]
    command += ["--max_steps", str(STEPS), "--save_steps", "4", "--logging_steps", "1", "--learning_rate", "5e-3"]
    command += ["--per_device_train_batch_size", "4"]
    assert main([*command, "--output_dir", str(folder / "out")]) == 0
    return request.param, base, command, folder / "out"


def numbered():
    return [(n, record) for n in range(3) for record in DIALOGUES]


def test_it_is_trained_as_a_tree(trained):
    report = json.loads((trained[3] / "run.json").read_text())
    assert report["layout"] == "tree"
    assert report["tokens_computed"] < 0.7 * report["tokens_padded"]


def test_killed_and_resumed_it_is_the_same_run(trained, tmp_path):
    _, _, command, whole = trained
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "atomtune", *command, "--output_dir", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    while not (out / "checkpoint-4").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "adapter_model.safetensors").exists(), "it ended before it was killed"
    assert main([*command, "--output_dir", str(out), "--resume"]) == 0
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()
    ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (out, whole))
    assert ours["loss_history"] == theirs["loss_history"]
