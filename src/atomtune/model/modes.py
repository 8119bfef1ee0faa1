"""Modes: temporary modes of a model, restored afterwards."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in eval mode and draws no random numbers.

    A resumed run must draw the same numbers as an uninterrupted one.
    """
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


@contextlib.contextmanager
def as_in_training(inner: Any) -> Iterator[None]:
    """Within this context the embeddings require a gradient, so that every layer computes as in training.

    Otherwise our fused layers would fall back to PEFT's code, and bitsandbytes would permanently repack 4-bit layers
    that load_base did not exempt from it.
    """
    # A clone, because CTRL scales its embeddings in place, which torch forbids for a leaf.
    hook = inner.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_().clone())
    with hook, torch.inference_mode(False):  # which enables gradients too
        yield
