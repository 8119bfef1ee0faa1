"""Recompute: which layers recompute their activations in the backward pass instead of keeping them."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def recomputable_layers(module: nn.Module) -> list[GradientCheckpointingLayer]:
    """The outermost layers that can be recomputed one by one and that have trained weights, in order.

    Empty if the model recomputes in a way of its own.
    """
    layers: list[GradientCheckpointingLayer] = []
    for child in module.children():
        if not isinstance(child, GradientCheckpointingLayer):
            layers += recomputable_layers(child)
        elif any(weight.requires_grad for weight in child.parameters()):
            layers.append(child)
    return layers


def recompute_first(model: nn.Module, share: float) -> None:
    """Recompute only this share of the layers, instead of all: the first ones, rounded up.

    The backward pass starts at the last layers, so their activations are already freed when a recomputed layer needs
    memory for its own.
    """
    layers = recomputable_layers(model)
    kept = int((1 - share) * len(layers) + 1e-6)
    for layer in layers[len(layers) - kept :]:
        for part in layer.modules():  # Zamba2's layers contain other layers
            if isinstance(part, GradientCheckpointingLayer):
                part.gradient_checkpointing = False
