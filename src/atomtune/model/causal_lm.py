"""Causal LM: what this project asks of a model, written down as a type.

Every class that transformers' AutoModelForCausalLM gives has it, and so does one that PEFT wraps. Models that bring
their own code lack some (`model.loss.takes` asks before a keyword is passed).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class CausalLM(nn.Module):
    """The type of a transformers causal LM or of a PeftModel around one. For annotations: nothing is made of it.

    A class and not a Protocol, because only so can it be handed to whatever wants an nn.Module.
    """

    config: Any
    generation_config: Any
    device: torch.device
    generate: Callable[..., torch.Tensor]  # → [B, T + new]
    get_input_embeddings: Callable[[], nn.Module]
    get_output_embeddings: Callable[[], nn.Module | None]
    save_pretrained: Callable[..., Any]
