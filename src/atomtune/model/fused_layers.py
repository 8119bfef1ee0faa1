"""Fused layers: layers of a model that compute in fewer, larger steps during training.

Weights, names and saved files do not change; verify compares the result with plain transformers + PEFT.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from atomtune.model import liger
from atomtune.model.causal_lm import CausalLM
from atomtune.model.fused_lora import compute_together
from atomtune.model.fused_norm import fuse_norms


def fuse_for_a_run(model: CausalLM, circumstances: liger.Circumstances, *, say: Callable[[str], None]) -> bool:
    """Fuse all that a run fuses in its model; returns whether Liger's kernels are used.

    FSDP and DeepSpeed move weights out of the layers between calls, so such a run fuses nothing here.
    """
    if not circumstances.is_sharded:
        device = model.get_input_embeddings().weight.device
        fuse_layers(model, input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))
    return liger.use(model, circumstances, say=say)


def fuse_layers(model: nn.Module, **example_inputs: Any) -> None:
    """Fuse the layers that are recognised in a model with an adapter; leave the others as they are."""
    compute_together(model, **example_inputs)
    fuse_norms(model)
