"""Loss: the surprise of the target tokens, summed, and their count.

Before: batch.collate.  After: train.trainer divides by the targets of the whole global batch.
Only target positions reach the output matrix, a chunk at a time: the logits of a batch never exist at once.
Letters: B rows, T positions, D hidden width, N targets, V words.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from atomtune.model.row_attention import ROW_PLAN, ROWS

#: Logits that exist at once: 2^20 of them are 4 MiB in float32, and as much again for their gradient.
CHUNK_LOGITS = 2**20
#: But at least this many targets at a time, because the output matrix is read once for each chunk (128 x 65,000 words
#: are 32 MiB).
LEAST_TARGETS = 128


def innermost(model: nn.Module) -> Any:
    """The causal LM inside DDP, DeepSpeed and PEFT."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def takes(model: nn.Module, name: str) -> bool:
    """Whether the innermost model's forward has this parameter (remote code often lacks some)."""
    return name in inspect.signature(innermost(model).forward).parameters


def target_nats(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the surprise of the batch's targets.

    batch  a collate.Batch on the model's device
    Returns (nats, count): nats is a float32 sum (float64 for a float64 model), count is sum(learn).
    Memory: CHUNK_LOGITS * 4 bytes for logits, and as much for their gradient, where the model's output layers can be
    called apart from its body (`Head`); else [B, K, V] for the K columns that hold a target.
    A batch without targets gives a zero that is tied to the weights, so that every rank has a gradient.
    Checked against one record at a time: tests/train/test_oracle.py.
    """
    target, learn = batch["target"], batch["learn"]
    if len(target) and (head := Head.of(model)):
        picked = head.hidden(model, batch)  # [N, D]
        return head.nats(picked, target, learn, label_smoothing=label_smoothing), learn.sum()
    logits = _target_logits(model, batch)  # [N, V]
    if not len(target):
        return _exact(logits).sum() * 0, learn.sum()
    return _weighted(logits, target, learn, label_smoothing), learn.sum()


@torch.no_grad()
def target_log_probabilities(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Of each target [N], by the same road as the loss."""
    head = Head.of(model)
    logits = head.logits(head.hidden(model, batch)) if head else _target_logits(model, batch)
    return -functional.cross_entropy(_exact(logits), batch["target"], reduction="none")


def _target_logits(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """[N, V] from one call of the whole model; all its logits, tied to the weights, where there is no target."""
    inputs = model_inputs(model, batch)
    columns, where = torch.unique(batch["source"], return_inverse=True)  # [K], [N]
    if takes(model, "logits_to_keep") and len(columns):
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits  # [B, K, V]
    else:
        logits = model(**inputs, use_cache=False).logits  # [B, T, V]
        where = batch["source"]
    return logits[batch["row"], where] if len(columns) else logits


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's forward is given for a batch."""
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
    if takes(model, "position_ids"):
        inputs["position_ids"] = batch["position_ids"]
    plan = batch["plan"]
    if plan is None:
        return {**inputs, "attention_mask": batch["attention_mask"]}
    plan = plan.to(batch["input_ids"].device)
    if innermost(model).config._attn_implementation != ROWS:
        return {**inputs, "attention_mask": plan.visible(None)}
    # A mask of four dimensions is handed on as it is, so the library neither builds one nor guesses packing.
    return {**inputs, "attention_mask": plan.until.new_zeros(1, 1, 1, 1), ROW_PLAN: plan}


def _exact(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _weighted(logits: torch.Tensor, target: torch.Tensor, learn: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    each = functional.cross_entropy(_exact(logits), target, reduction="none", label_smoothing=label_smoothing)  # [N]
    return (each * learn).sum()


class Head:
    """Everything a causal LM does after its body: output matrix, scaling, soft-capping, by the model's own code.

    The model's forward is run with a body that only hands through what it is given, so no architecture's arithmetic is
    written down here.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.name = model, model.base_model_prefix
        self.output_of_body: type[ModelOutput] = BaseModelOutput

    @classmethod
    def of(cls, model: nn.Module) -> "Head | None":
        """The head of a model, or None where it cannot be called apart."""
        inner = innermost(model)
        body = getattr(inner, getattr(inner, "base_model_prefix", "") or "-", None)
        if body is None or body is inner or not (takes(model, "logits_to_keep") and takes(model, "inputs_embeds")):
            return None
        # FSDP and ZeRO-3 gather a module's weights around its own call only; the whole model is then called once.
        if any(type(p) is not nn.Parameter or hasattr(p, "ds_id") for p in cls(inner).parameters()):
            return None
        return cls(inner)

    def parameters(self) -> Iterator[nn.Parameter]:
        for name, child in self.model.named_children():
            if name != self.name:
                yield from child.parameters()

    def hidden(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """[N, D] hidden states from which the targets are predicted: what the body gives when the whole is called.

        `model` may wrap this one (DDP, PEFT) and is called as a whole; of its logits only one position is computed.
        """
        seen: list[ModelOutput] = []
        hook = getattr(self.model, self.name).register_forward_hook(lambda _m, _i, output: seen.append(output))
        try:
            model(**model_inputs(model, batch), use_cache=False, logits_to_keep=batch["source"][:1])
        finally:
            hook.remove()
        if isinstance(seen[0], ModelOutput):
            self.output_of_body = type(seen[0])
        return seen[0][0][batch["row"], batch["source"]]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D] → [N, V]"""
        body = getattr(self.model, self.name)
        own = vars(body).get("forward")  # of its own where accelerate has hooked it
        body.forward = self._hand_through
        try:
            return self.model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            del body.forward
            if own is not None:
                body.forward = own

    def _hand_through(self, *_args: Any, inputs_embeds: torch.Tensor, **_kwargs: Any) -> ModelOutput:
        return self.output_of_body(last_hidden_state=inputs_embeds)

    def nats(
        self,
        hidden: torch.Tensor,
        target: torch.Tensor,
        learn: torch.Tensor,
        *,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Sum of learn * surprise over [N, D] hidden states, some targets at a time."""
        words = self.model.config.get_text_config().vocab_size
        weights = [p for p in self.parameters() if p.requires_grad]

        def part(hidden: torch.Tensor, span: slice) -> torch.Tensor:
            return _weighted(self.logits(hidden), target[span], learn[span], label_smoothing)

        return _Chunked.apply(part, max(LEAST_TARGETS, CHUNK_LOGITS // words), hidden, *weights)


class _Chunked(torch.autograd.Function):
    """A sum over chunks whose gradient is taken chunk by chunk in the forward pass, so that nothing is kept or redone.

    That is allowed because the result is one number: its gradient is known up to the factor that backward brings.
    """

    @staticmethod
    def forward(
        ctx: Any,
        part: Callable[[torch.Tensor, slice], torch.Tensor],
        size: int,
        hidden: torch.Tensor,
        *weights: nn.Parameter,
    ) -> torch.Tensor:
        wanted = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weights = [torch.zeros_like(weight) for weight in weights] if wanted else []
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for start in range(0, len(hidden), size):
            span = slice(start, start + size)
            with torch.set_grad_enabled(wanted):
                piece = hidden[span].detach().requires_grad_(wanted)
                nats = part(piece, span)
            total += nats.detach()
            if grad_hidden is not None:
                grad_hidden[span], *more = torch.autograd.grad(nats, (piece, *weights))
                grad_weights = [so_far + one for so_far, one in zip(grad_weights, more, strict=True)]
        ctx.save_for_backward(*([grad_hidden, *grad_weights] if grad_hidden is not None else []))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *((saved * grad).to(saved.dtype) for saved in ctx.saved_tensors)
