"""Causal LM: the type of the models that this project works with.

All classes that transformers' AutoModelForCausalLM returns have these members, and so do models wrapped by PEFT.
Models with their own code lack some arguments of forward; `model.loss.takes` checks before one is passed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class CausalLM(nn.Module):
    """The type of a transformers causal LM, or of a PeftModel around one. Only for annotations, never instantiated.

    A class and not a Protocol, so that it can be passed where an nn.Module is expected.
    """

    config: Any
    generation_config: Any
    device: torch.device
    generate: Callable[..., torch.Tensor]  # → [B, T + new tokens]
    get_input_embeddings: Callable[[], nn.Embedding]
    get_output_embeddings: Callable[[], nn.Linear | None]
    save_pretrained: Callable[..., Any]
