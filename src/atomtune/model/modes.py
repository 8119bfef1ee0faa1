"""Modes: a model that is asked something for a moment, and then is as it was."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within this, no module draws random numbers: a resumed run must draw what an unbroken one does."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


@contextlib.contextmanager
def as_in_training(inner: Any) -> Iterator[None]:
    """Within this, every layer is handed what needs a gradient, and computes as in training.

    Called without one, ours go PEFT's own way, and bitsandbytes packs 4-bit layers that load_base did not make for
    serving, for good.
    """
    # A copy, because CTRL scales its embeddings in place, which torch refuses for what a gradient starts from.
    hook = inner.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_().clone())
    try:
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
