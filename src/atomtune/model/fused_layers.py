"""The layers of a model that compute in fewer, larger steps while it trains.

Weights, names and what is saved stay as they are; verify compares the result with plain transformers + PEFT.
"""

from typing import Any

from torch import nn

from atomtune.model.fused_lora import compute_together
from atomtune.model.fused_norm import fuse_norms


def fuse_layers(model: nn.Module, **example_inputs: Any) -> None:
    """Fuse what is recognised in a model with an adapter; the rest stays its own."""
    compute_together(model, **example_inputs)
    fuse_norms(model)
