"""Program state: afterwards the program is as it was, and what fails inside is an error of atomtune."""

import errno
import logging
import os
import random
import warnings

import datasets
import huggingface_hub
import numpy
import pytest
import torch
import transformers
from transformers import set_seed

from atomtune import inspect, train
from atomtune.errors import BadSettings, RunFailed
from atomtune.program_state import program_state_kept
from tests.conftest import DIALOGUES, write_jsonl


def of_the_libraries() -> dict:
    """What the libraries print in this program."""
    return {
        "levels": [logging.getLogger(name).level for name in ("transformers", "datasets", "accelerate")],
        "bars": [
            transformers.utils.logging.is_progress_bar_enabled(),
            huggingface_hub.utils.are_progress_bars_disabled(),
            datasets.are_progress_bars_disabled(),
        ],
        "warnings": list(warnings.filters),
    }


def drawn() -> list[float]:
    return [random.random(), numpy.random.random(), torch.rand(1).item()]


def test_a_run_leaves_the_programs_random_numbers_and_messages_alone(models, tmp_path):
    # Regression: after a run, random.sample(records, 100) drew the same records in every notebook, and transformers no
    # longer warned about weights that it had not found in a checkpoint.
    base, data = models("llama"), write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    set_seed(5)
    expected, before = drawn(), of_the_libraries()
    set_seed(5)
    run = train(base, data, output_dir=tmp_path / "out", max_steps=1, dtype="float32")
    assert drawn() == expected and of_the_libraries() == before
    inspect(data, base)
    run.load()
    assert of_the_libraries() == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_run_trains_in_a_program_that_computes_without_gradients(models, tmp_path, mode):
    # Regression: the base was said to have no linear layer that LoRA could adapt.
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    with mode():
        run = train(models("llama"), data, output_dir=tmp_path / "out", max_steps=1, dtype="float32")
        assert not torch.is_grad_enabled()
    assert run.figures["status"] == "finished"


def test_bars_that_the_program_hides_stay_hidden():
    huggingface_hub.utils.disable_progress_bars()
    try:
        with program_state_kept():
            huggingface_hub.utils.enable_progress_bars()
        assert huggingface_hub.utils.are_progress_bars_disabled()
    finally:
        huggingface_hub.utils.enable_progress_bars()


@pytest.mark.parametrize(
    ("failure", "error", "words"),
    [
        (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "a" * 300), BadSettings, "File name too long"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RunFailed, "The disk is full or failing"),
        (torch.OutOfMemoryError("CUDA out of memory"), RunFailed, "Out of memory"),
    ],
)
def test_a_failure_of_the_machine_is_an_error_of_ours(failure, error, words):
    with pytest.raises(error, match=words), program_state_kept():
        raise failure


@pytest.mark.parametrize("failure", [ValueError("a bug"), KeyboardInterrupt(), BadSettings(["no such setting"])])
def test_all_other_errors_are_raised_as_they_are(failure):
    with pytest.raises(type(failure)) as caught, program_state_kept():
        raise failure
    assert caught.value is failure
