"""A model that is spared walks through its modules behaves as one that is not."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from atomtune.model.listed_modules import learned_weights, list_modules


class Model(nn.Module):
    """A frozen layer, a trained one, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.learned, self.dropout = nn.Linear(3, 3), nn.Linear(3, 3), nn.Dropout(0.5)
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.learned(self.frozen(x)))


@pytest.fixture
def model() -> Model:
    made = Model()
    list_modules(made)
    return made


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@contextmanager
def no_walk() -> Iterator[None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a walk through the modules")

    with patch.object(nn.Module, "named_modules", refuse), patch.object(nn.Module, "named_children", refuse):
        yield


def test_a_training_step_does_not_traverse_the_modules(model):
    model(torch.ones(1, 3)).sum().backward()
    with no_walk():
        assert model.train() is model
        learned_weights(model)
        model.zero_grad()
    assert all(weight.grad is None for weight in model.parameters())


def test_the_learned_weights_are_the_same_with_and_without_a_walk(model):
    for each in (model, Model()):
        assert [id(weight) for weight in learned_weights(each)] == [id(each.learned.weight), id(each.learned.bias)]


@pytest.mark.parametrize("part", ["frozen", "dropout"])
def test_train_reaches_a_submodule_that_was_set_to_eval(model, part):
    getattr(model, part).eval()
    model.train()
    assert modes(model) == [True] * 4


def test_eval_reaches_every_module_and_training_returns(model):
    model.eval()
    assert modes(model) == [False] * 4
    model.dropout.training = True
    model.eval()
    assert modes(model) == [False] * 4
    model.train()
    assert modes(model) == [True] * 4


def test_gradients_can_be_set_to_zero_instead_of_none(model):
    model(torch.ones(1, 3)).sum().backward()
    model.zero_grad(set_to_none=False)
    assert model.learned.weight.grad is not None and not model.learned.weight.grad.any()


def test_class_and_state_dict_of_the_model_are_unchanged(model):
    assert isinstance(model, Model) and type(model).__name__ == "Model"
    assert list(model.state_dict()) == list(Model().state_dict())


def test_a_deep_copy_tracks_its_own_modules(model):
    twin = copy.deepcopy(model)
    twin.dropout.eval()
    twin.train()
    twin(torch.ones(1, 3)).sum().backward()
    twin.zero_grad()
    assert twin.dropout.training and twin.learned.weight.grad is None
    model.eval()
    assert modes(twin) == [True] * 4
