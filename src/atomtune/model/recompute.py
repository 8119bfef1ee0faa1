"""Recompute: which layers compute their activations a second time in the backward pass, instead of keeping them."""

from collections.abc import Iterator

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def recomputable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can be recomputed one by one and hold trained weights, the first one first; none within another.

    Empty where a model recomputes in a way of its own.
    """
    return list(_outermost(model))


def recompute_first(model: nn.Module, share: float) -> None:
    """Of layers that are all recomputed, leave only this share so: the first ones, rounded up.

    The last ones are the first whose activations the backward pass frees: they are gone before a recomputed layer needs
    room for its own.
    """
    layers = recomputable_layers(model)
    kept = int((1 - share) * len(layers) + 1e-6)
    for layer in layers[len(layers) - kept :]:
        for part in layer.modules():  # Zamba2's layers hold others
            if isinstance(part, GradientCheckpointingLayer):
                part.gradient_checkpointing = False


def _outermost(module: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    for child in module.children():
        if not isinstance(child, GradientCheckpointingLayer):
            yield from _outermost(child)
        elif any(weight.requires_grad for weight in child.parameters()):
            yield child
