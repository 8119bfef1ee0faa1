"""Listed modules: a model in training whose train() and zero_grad() go through lists, not through the module tree.

Before each step the Trainer calls train(), and after it zero_grad(). torch's own visit every module in Python: 9 ms a
step for 32 layers with adapters, in which a GPU has nothing to do.
"""

from typing import Self

from torch import nn


def list_modules(model: nn.Module) -> None:
    """Let a model's train() and zero_grad() go through lists of its modules and weights, made here once."""
    learned = learned_weights(model)
    # As in fused_lora, a change of class leaves modules, names and what is saved as they are.
    model.__class__ = type(type(model).__name__, (ListedModules, type(model)), {})
    assert isinstance(model, ListedModules)
    model.all_modules = list(model.modules())
    model.all_learned = learned


def learned_weights(model: nn.Module) -> list[nn.Parameter]:
    """The trained weights of a model; without a walk through its modules after `list_modules`."""
    if isinstance(model, ListedModules):
        return model.all_learned
    return [weight for weight in model.parameters() if weight.requires_grad]


class ListedModules(nn.Module):
    """First base class of a model in training, before the model's own class."""

    all_modules: list[nn.Module]
    all_learned: list[nn.Parameter]

    def train(self, mode: bool = True) -> Self:
        if mode and all(module.training for module in self.all_modules):
            return self
        return super().train(mode)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            super().zero_grad(set_to_none)
            return
        for weight in self.all_learned:
            weight.grad = None
