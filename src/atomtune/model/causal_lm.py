"""Causal LM: what this project asks of a model, written down as a type.

Every class that transformers' AutoModelForCausalLM gives has it, and so does one that PEFT wraps. Models that bring
their own code lack some (`model.loss.takes` asks before a keyword is passed).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn


class CausalLM(Protocol):
    """A transformers causal LM or a PeftModel around one: an nn.Module with a config and logits."""

    config: Any
    generation_config: Any
    training: bool

    @property
    def device(self) -> torch.device: ...

    def __call__(self, **inputs: Any) -> Any: ...  # .logits [B, T, V]

    def generate(self, **options: Any) -> torch.Tensor: ...  # [B, T + new]

    def train(self, mode: bool = True) -> "CausalLM": ...

    def eval(self) -> "CausalLM": ...

    def requires_grad_(self, requires_grad: bool = True) -> "CausalLM": ...

    def to(self, *target: Any) -> "CausalLM": ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def get_input_embeddings(self) -> nn.Module: ...

    def get_output_embeddings(self) -> nn.Module | None: ...

    def save_pretrained(self, save_directory: str | Path) -> Any: ...
