"""Loss: the surprise of the target tokens, summed, and their count.

Before: batch.collate.  After: train.trainer divides by the targets of the whole global batch.
Letters: B rows, T positions, K columns in which any row has a target, N targets, V words.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def takes(model: nn.Module, name: str) -> bool:
    """Whether the innermost model's forward has this parameter (remote code often lacks some)."""
    inner: Any = model
    while hasattr(inner, "module"):  # DDP, DeepSpeed
        inner = inner.module
    if hasattr(inner, "get_base_model"):  # PEFT
        inner = inner.get_base_model()
    return name in inspect.signature(inner.forward).parameters


def target_nats(
    model: nn.Module, batch: Mapping[str, torch.Tensor], *, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the surprise of the batch's targets.

    batch  a collate.Batch on the model's device
    Returns (nats, count): nats is a float32 sum (float64 for a float64 model), count is sum(learn).
    Only the columns that hold a target reach the output matrix: [B, K, V] instead of [B, T, V].
    A batch without targets gives a zero that is tied to the weights, so that every rank has a gradient.
    Checked against one record at a time: tests/train/test_oracle.py.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if takes(model, "position_ids"):
        inputs["position_ids"] = batch["position_ids"]
    count = batch["learn"].sum()
    columns, where = torch.unique(batch["source"], return_inverse=True)  # [K], [N]
    if takes(model, "logits_to_keep") and len(columns):
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits  # [B, K, V]
    else:
        logits = model(**inputs, use_cache=False).logits  # [B, T, V]
        where = batch["source"]
    picked = logits[batch["row"], where]  # [N, V]
    picked = picked if picked.dtype == torch.float64 else picked.float()
    if not len(columns):
        return logits.sum().to(picked.dtype) * 0, count
    each = functional.cross_entropy(picked, batch["target"], reduction="none", label_smoothing=label_smoothing)  # [N]
    return (each * batch["learn"]).sum(), count
