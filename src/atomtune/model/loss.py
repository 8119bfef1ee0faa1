"""Loss: the sum of the surprise of the target tokens, and their count; the trainer divides by the global batch's count.

Only target positions are multiplied with the output matrix, in chunks, so that all logits of a batch never exist at
once.
Letters: B rows, T positions, D hidden width, N targets, V vocabulary size.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from atomtune.model.memory import free_on_gpu
from atomtune.model.row_attention import ROW_PLAN, ROWS
from atomtune.model.row_mixers import announce
from atomtune.model.surprise import exact, exact_dtype, surprise

#: Logits that exist at once: 2^20 are 4 MiB in float32, and their gradient overwrites them.
CHUNK_LOGITS = 2**20
#: At least this many targets per chunk, because each chunk reads the whole output matrix (for a vocabulary of 65,000,
#: their logits are 32 MiB in float32).
LEAST_TARGETS = 128
#: Bytes per logit: the logit in bfloat16 (2), its softmax in float32 (4), which its gradient overwrites, and that in
#: bfloat16 (2; none in float32). A GPU also keeps the logit in float32 beside its softmax.
BYTES_A_LOGIT, BYTES_A_LOGIT_ON_GPU = 8, 10
#: On a GPU a chunk may take a sixteenth of the free memory, so that the output matrix is read only once or twice: for a
#: vocabulary of 150,000 it has 1 GB.
FREE_FOR_LOGITS, MOST_LOGITS = 1 / 16, 2**27


def innermost(model: nn.Module) -> Any:
    """The causal LM inside DDP, DeepSpeed and PEFT wrappers."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def body_of(model: nn.Module) -> nn.Module:
    """The part of a causal LM below its head; the model itself if the two cannot be separated."""
    return innermost(model).base_model


def takes(model: nn.Module, name: str) -> bool:
    """Whether the innermost model's forward has this parameter; models with their own code lack some."""
    return name in inspect.signature(innermost(model).forward).parameters


def target_nats(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the surprise of the batch's targets, in nats.

    batch  a collate.Batch on the model's device
    Returns (nats, count): nats is a float32 sum (float64 for a float64 model), count is sum(learn).

    In training, a router's auxiliary loss that the config switches on is added, times its factor and the count.
    Dividing by the sum of all counts then gives the mean of the batches' losses, weighted by their targets.

    Memory: BYTES_A_LOGIT for the logits of `targets_at_once`, if the model's head can be called without its body
    (`Head`); else for [B, K, V] logits, where K columns have a target.
    A batch without targets gives a zero that depends on the weights, so that every rank has a gradient.
    Checked against one record at a time: tests/train/test_trainer.py.
    """
    target, learn = batch["target"], batch["learn"]
    count = learn.sum()
    if len(target) and (head := Head.of(model)):
        picked = head.hidden(model, batch)  # [N, D]
        if picked is not None:
            nats = head.nats(picked, target, learn, label_smoothing=label_smoothing)
            return _with_auxiliary(nats, count, model, head.output), count
    logits, output = _target_logits(model, batch)  # [N, V]
    if not len(target):
        return exact(logits).sum() * 0, count
    nats = surprise(logits, target, learn, label_smoothing)
    return _with_auxiliary(nats, count, model, output), count


def auxiliary_factor(model: nn.Module) -> float:
    """The factor of a router's auxiliary loss if the config switches it on, else 0.

    Nearly all published configs have it off (`output_router_logits`).
    """
    inner = innermost(model)
    config = inner.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    for holder in (inner, config):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):  # the second is JetMoE's
            if hasattr(holder, name):
                return float(getattr(holder, name))
    return 0.0


def _with_auxiliary(nats: torch.Tensor, count: torch.Tensor, model: nn.Module, output: Any) -> torch.Tensor:
    auxiliary = getattr(output, "aux_loss", None)
    if auxiliary is None or not model.training:
        return nats
    return nats + auxiliary_factor(model) * auxiliary.to(nats) * count


@torch.no_grad()
def target_log_probabilities(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """[N] log-probabilities of the targets, computed by the same code as the loss."""
    head = Head.of(model)
    picked = head.hidden(model, batch) if head else None
    logits = _target_logits(model, batch)[0] if head is None or picked is None else head.logits(picked)
    return -functional.cross_entropy(exact(logits), batch["target"], reduction="none")


def _target_logits(model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, Any]:
    """Logits of the targets [N, V] from one call of the whole model, and the output of that call.

    Without targets, the logits of some tokens, which depend on the weights.
    """
    inputs = model_inputs(model, batch)
    columns, where = torch.unique(batch["predicted_from"], return_inverse=True)  # [K], [N]
    if takes(model, "logits_to_keep"):
        kept = columns if len(columns) else columns.new_zeros(1)
        output = model(**inputs, use_cache=False, logits_to_keep=kept)  # logits [B, K, V]
    else:
        output = model(**inputs, use_cache=False)  # logits [B, T, V]
        where = batch["predicted_from"]
    return (output.logits[batch["row"], where] if len(columns) else output.logits), output


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the model's forward for a batch."""
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
    plan = batch["plan"]
    if plan is None:
        # No position_ids: the model counts positions as for a single record (RoBERTa's start after its padding id).
        return {**inputs, "attention_mask": batch["attention_mask"]}
    plan = plan.to(batch["input_ids"].device)
    announce(body_of(model), plan)
    if not takes(model, "position_ids"):  # it has no attention: all its layers carry a state
        return inputs
    inputs["position_ids"] = batch["position_ids"]
    if innermost(model).config._attn_implementation != ROWS:
        return {**inputs, "attention_mask": plan.visible(None)}
    # transformers passes a mask of four dimensions on unchanged, so it neither builds one nor infers packing.
    return {**inputs, "attention_mask": plan.until.new_zeros(1, 1, 1, 1), ROW_PLAN: plan}


class _PassThrough(nn.Module):
    """A causal LM's body for a head alone: it returns the hidden states it is given."""

    def __init__(self, output: type[ModelOutput], body: nn.Module) -> None:
        vars(self)["body"] = body  # not a submodule: the twin shall have the weights of its head only
        super().__init__()
        self.output = output

    def __getattr__(self, name: str) -> Any:
        """Read from the real body what a head reads from its body (Falcon-H1 keeps the scale of its logits there)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "body" not in vars(self):
                raise
            return getattr(vars(self)["body"], name)

    def forward(self, *_args: Any, inputs_embeds: torch.Tensor, **_kwargs: Any) -> ModelOutput:
        return self.output(last_hidden_state=inputs_embeds)


def _twin(module: Any) -> Any:
    """A module with the same children and weights, whose children can be replaced without changing the original."""
    twin = copy.copy(module)
    # Torch's DataParallel does the same to make replicas; there is no public name for it
    twin._modules = dict(twin._modules)
    vars(twin).pop("forward", None)  # accelerate's hooked forward would call the original module
    return twin


class Head:
    """All that a causal LM does after its body (output matrix, scaling, soft caps), computed by the model's own code.

    A twin of the model runs the model's own forward with the same weights, on a body that returns its input. So no
    architecture's arithmetic is repeated here, and the model itself is not changed.
    (`get_output_embeddings` alone would leave out the scaling of Granite and the soft caps of Gemma.)
    """

    def __init__(self, model: Any) -> None:
        self.model, self.body_name = model, model.base_model_prefix
        self.path: tuple[str, ...] = (self.body_name,)  # from the model to the module whose output the head reads
        self.output_of_body: type[ModelOutput] = BaseModelOutput
        self.output: Any = None  # the output of the last call of the whole model

    @classmethod
    def of(cls, model: nn.Module) -> "Head | None":
        """The head of a model; None if it cannot be called without the body."""
        inner = innermost(model)
        if body_of(model) is inner or not (takes(model, "logits_to_keep") and takes(model, "inputs_embeds")):
            return None
        head = cls(inner)
        # FSDP and ZeRO-3 gather a module's weights only during its own call, so the whole model is called once instead.
        if any(type(p) is not nn.Parameter or hasattr(p, "ds_id") for p in head.parameters()):
            return None
        return head

    def parameters(self) -> Iterator[nn.Parameter]:
        for name, child in self.model.named_children():
            if name != self.body_name:
                yield from child.parameters()

    def hidden(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor | None:
        """[N, D] hidden states from which the targets are predicted: the body's output in a call of the whole model.

        None if the model's forward does not call the body (models with their own code that call the layers directly).
        `model` may be a wrapper (DDP, PEFT). It is called as a whole, and computes the logits of one position only.
        """
        outputs: dict[tuple[str, ...], ModelOutput] = {}
        inputs = model_inputs(model, batch)
        with contextlib.ExitStack() as hooks:
            for path, body in self._bodies().items():
                note = body.register_forward_hook(lambda _m, _i, output, path=path: outputs.update({path: output}))
                hooks.enter_context(note)
            self.output = model(**inputs, use_cache=False, logits_to_keep=batch["predicted_from"][:1])
        if not outputs:
            return None
        self.path = min(outputs, key=len)  # the outermost body that was called
        output = outputs[self.path]
        if isinstance(output, ModelOutput):
            self.output_of_body = type(output)
        return output[0][batch["row"], batch["predicted_from"]]  # [B, T, D] → [N, D]

    def _bodies(self) -> dict[tuple[str, ...], nn.Module]:
        """Modules whose output the head may read: the body, or the decoder in it if forward skips the body (OPT)."""
        body = getattr(self.model, self.body_name)
        bodies: dict[tuple[str, ...], nn.Module] = {(self.body_name,): body}
        if isinstance(decoder := getattr(body, "decoder", None), nn.Module):
            bodies[self.body_name, "decoder"] = decoder
        return bodies

    def twin(self) -> Any:
        """The model with the same weights, and a body that returns its input."""
        twin = outer = _twin(self.model)
        *above, last = self.path
        for name in above:
            inner = _twin(getattr(outer, name))
            setattr(outer, name, inner)
            outer = inner
        setattr(outer, last, _PassThrough(self.output_of_body, getattr(outer, last)))
        return twin

    def logits(self, hidden: torch.Tensor, twin: Any = None) -> torch.Tensor:
        """[N, D] hidden states → [N, V]"""
        output = (twin or self.twin())(inputs_embeds=hidden[None], use_cache=False)
        return output.logits[0].to(hidden.device)

    def nats(
        self,
        hidden: torch.Tensor,
        target: torch.Tensor,
        learn: torch.Tensor,
        *,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Sum of learn * surprise over hidden states [N, D], in chunks of targets.

        target, learn  [N] token ids, and how often each is learned
        """
        vocab_size = self.model.config.get_text_config().vocab_size
        # The head may have trained weights (LoRA on lm_head). An autograd.Function must be passed them to give
        # gradients.
        learned = [p for p in self.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
        twin = self.twin()

        def nats_of(hidden: torch.Tensor, chunk: slice) -> torch.Tensor:
            return surprise(self.logits(hidden, twin), target[chunk], learn[chunk], label_smoothing)

        return _Chunked.apply(nats_of, targets_at_once(vocab_size, hidden.device), hidden, *learned)


def targets_at_once(vocab_size: int, device: torch.device) -> int:
    """How many targets have logits at the same time."""
    logits = _logits_that_fit(device) if device.type == "cuda" else CHUNK_LOGITS
    return max(LEAST_TARGETS, logits // vocab_size)


@cache
def _logits_that_fit(device: torch.device) -> int:
    """How many logits fit in a GPU's free memory at the first loss, while the activations of a forward are held."""
    logits = int(FREE_FOR_LOGITS * free_on_gpu(device)) // BYTES_A_LOGIT_ON_GPU
    return min(MOST_LOGITS, max(CHUNK_LOGITS, logits))


class _Chunked(torch.autograd.Function):
    """A sum over chunks whose gradient is computed chunk by chunk in the forward pass, so no logits are kept.

    This works because the result is a single number: backward only multiplies the gradient by a factor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        nats_of: Callable[[torch.Tensor, slice], torch.Tensor],
        size: int,
        hidden: torch.Tensor,
        *weights: nn.Parameter,
    ) -> torch.Tensor:
        learns = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if learns else None
        grad_weights = [torch.zeros_like(weight) for weight in weights] if learns else []
        total = torch.zeros((), dtype=exact_dtype(hidden.dtype), device=hidden.device)
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(learns):
                hidden_chunk = hidden[chunk].detach().requires_grad_(learns)
                nats = nats_of(hidden_chunk, chunk)
            total += nats.detach()
            if grad_hidden is not None:
                grad_hidden[chunk], *grads = torch.autograd.grad(nats, (hidden_chunk, *weights))
                for total_grad, grad in zip(grad_weights, grads, strict=True):
                    total_grad.add_(grad)
        ctx.save_for_backward(*([] if grad_hidden is None else [grad_hidden, *grad_weights]))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(saved * grad for saved in ctx.saved_tensors)
