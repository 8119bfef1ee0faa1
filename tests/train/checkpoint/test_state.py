"""States come back as they were, and nothing in their files can run."""

import json
import random

import numpy
import pytest
import torch

from atomtune.train.checkpoint.state import load_state, random_state, save_state, set_random_state


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda weights: torch.optim.AdamW(weights, lr=1e-3, fused=True),
        lambda weights: torch.optim.SGD(weights, lr=1e-3, momentum=0.9),
        lambda weights: torch.optim.Adafactor(weights, lr=1e-3),
        lambda weights: torch.optim.LBFGS(weights, lr=1e-3),
    ],
)
def test_an_optimizer_comes_back(tmp_path, optimizer):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    made = optimizer([weight])

    def step():
        made.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    for _ in range(3):
        made.step(step)
    save_state(tmp_path, "optimizer", made.state_dict())
    assert same(load_state(tmp_path, "optimizer"), made.state_dict())


def test_what_json_does_not_know_is_kept(tmp_path):
    value = {
        1: (1, 2.5, None, True, "词"),
        "nested": [{"infinite": float("inf")}, ()],
        (0, "pair"): torch.tensor(3, dtype=torch.bfloat16),
        "dict": {"tensor": "a name that our own notation uses"},
    }
    save_state(tmp_path, "state", value)
    assert same(load_state(tmp_path, "state"), value)


def test_every_random_number_goes_on(tmp_path):
    save_state(tmp_path, "random", random_state())
    drawn = [random.random(), numpy.random.rand(), torch.rand(1).item()]
    set_random_state(load_state(tmp_path, "random"))
    assert [random.random(), numpy.random.rand(), torch.rand(1).item()] == drawn


def test_what_could_only_be_pickled_is_refused_with_its_place(tmp_path):
    with pytest.raises(TypeError, match=r"state\.function is a function"):
        save_state(tmp_path, "state", {"function": lambda: None})


def test_a_state_is_no_pickle_and_does_not_hold_on_to_its_file(tmp_path):
    tensor = torch.arange(4.0)
    save_state(tmp_path, "state", {"tensor": tensor})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.safetensors"]
    json.loads((tmp_path / "state.json").read_text())
    read = load_state(tmp_path, "state")["tensor"]
    (tmp_path / "state.safetensors").write_bytes(b"\0" * 100)  # a rotation may take the file away
    assert torch.equal(read, tensor)
