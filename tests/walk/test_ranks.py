"""Two processes train as one: the same global batches, loss, adapter and counts.

32 records are 4 whole steps, so no rank is filled up; where they are not, accelerate repeats some at an epoch's end.
"""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from atomtune.cli import main
from tests.train.test_oracle import relative_difference


def test_two_ranks_give_the_run_of_one(models, dialogues, tmp_path):
    command = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--use_cpu"]
    flags = ["--dtype", "float64", "--lora_dropout", "0", "--max_steps", "5", "--learning_rate", "1e-2"]
    flags += ["--logging_steps", "1", "--eval_size", "8", "--gradient_accumulation_steps", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*command, *flags, "--output_dir", str(one), "--per_device_train_batch_size", "4"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "atomtune"]
    more = ["--output_dir", str(two), "--per_device_train_batch_size", "2"]
    done = subprocess.run(
        [*launcher, *command, *flags, *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("records read") == 1, "one rank speaks"
    ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (two, one))
    losses = [[entry["loss"] for entry in record["loss_history"]] for record in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # the Trainer's running loss is float32
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-9)
    assert ours["records_used"] == theirs["records_used"] == 40
    examples = [record["examples_per_second"] * record["seconds"] for record in (ours, theirs)]
    assert examples[0] == pytest.approx(examples[1])
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (two, one)]
    assert relative_difference(*adapters) < 1e-6  # padded to other widths: RMSNorm computes in float32
