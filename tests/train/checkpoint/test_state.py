"""The Trainer's states are read only as tensors; a file with anything else is named before it is opened."""

import os
import random

import numpy
import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from atomtune.errors import BadModel
from atomtune.train.checkpoint.state import has_optimizer, refuse_programs, state_files

NEEDED = {
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 3},
}


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(4, 3))


@pytest.mark.parametrize("schedule", [kind.value for kind in SchedulerType])
def test_every_transformers_scheduler_state_passes_the_pickle_check(tmp_path, schedule):
    made = get_scheduler(
        schedule,
        torch.optim.AdamW([weight()], lr=1e-3),
        num_warmup_steps=2,
        num_training_steps=9,
        scheduler_specific_kwargs=NEEDED.get(schedule, {}),
    )
    torch.save(made.state_dict(), tmp_path / "scheduler.pt")
    refuse_programs(tmp_path)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.LBFGS])
def test_an_optimizer_state_passes_the_pickle_check(tmp_path, optimizer):
    one = weight()
    made = optimizer([one], lr=1e-3)

    def step():
        made.zero_grad()
        loss = (one**2).sum()
        loss.backward()
        return loss

    made.step(step)
    torch.save(made.state_dict(), tmp_path / "optimizer.pt")
    refuse_programs(tmp_path)
    assert has_optimizer(tmp_path)


def test_rng_states_pass_the_pickle_check(tmp_path):
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(states, tmp_path / "rng_state.pth")
    refuse_programs(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"PK\x03\x04torn", b"not a state"])
def test_a_corrupt_state_file_is_named(tmp_path, content):
    (tmp_path / "rng_state_3.pth").write_bytes(content)
    with pytest.raises(BadModel, match=r"rng_state_3\.pth .*\n.*--continue_training"):
        refuse_programs(tmp_path)


class Program:
    def __reduce__(self):
        return (os.mkdir, ("it-ran",))


def test_a_malicious_pickle_is_named_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": Program()}, "scaler.pt")
    with pytest.raises(BadModel, match=r"scaler\.pt is damaged, or it is a program"):
        refuse_programs(tmp_path)
    assert not (tmp_path / "it-ran").exists()


def test_files_the_trainer_does_not_load_are_not_state_files(tmp_path):
    for name in ("training_args.bin", "adapter_model.safetensors", "optimizer.json", "my_optimizer.pt"):
        (tmp_path / name).write_bytes(b"")
    assert state_files(tmp_path) == []
    assert not has_optimizer(tmp_path)
