"""Fused layers: layers of a model that compute in fewer, larger steps during training.

Weights, names and saved files do not change; verify compares the result with plain transformers + PEFT.
"""

from typing import Any

from torch import nn

from atomtune.model.fused_lora import compute_together
from atomtune.model.fused_norm import fuse_norms


def fuse_layers(model: nn.Module, **example_inputs: Any) -> None:
    """Fuse the layers that are recognised in a model with an adapter; leave the others as they are."""
    compute_together(model, **example_inputs)
    fuse_norms(model)
