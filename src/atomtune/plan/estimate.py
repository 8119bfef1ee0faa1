"""Estimate: from numbers of tokens and weights to bytes and seconds.

Only arithmetic, so that each figure can be checked by hand. Letters: N weights, T tokens, C tokens that a token sees,
H hidden size.
"""

import math
import time
from dataclasses import dataclass

import torch

from atomtune.choices import Quantize
from atomtune.language import message
from atomtune.model.loss import BYTES_A_LOGIT, targets_at_once
from atomtune.model.memory import activation_bytes, input_bytes
from atomtune.plan.model_size import ModelSize

#: Bytes per weight: nf4 with double quantization (QLoRA, Dettmers et al. 2023, arXiv 2305.14314: 4.127 bits); int8.
QUANTIZED_BYTES: dict[Quantize, float] = {"nf4": 4.127 / 8, "int8": 1.0}
#: Bytes per adapter weight: the weight, its gradient, and two states of Adam, all in float32.
ADAPTER_BYTES, GRADIENT_BYTES, ADAM_BYTES = 4, 4, 8
#: Bytes that CUDA takes before the first tensor; the share of a card's memory that can be filled before it fragments.
CUDA_CONTEXT, FILLED = 600 * 2**20, 0.94

#: On a CPU, torch caches what oneDNN prepares for each new row length, for at most 1,024 matrix products. A matrix has
#: six: its own and those of its two LoRA matrices, forward and backward. KERNEL_BYTES is per token and number that goes
#: in or out: measured 7 to 12 (docs/log.md, widths 512 to 1,536).
PRODUCTS_KEPT, PRODUCTS_A_MATRIX, KERNEL_BYTES = 1024, 6, 9

#: The share of the machine's matmul rate that a step reaches (benchmarks/README.md: 0.33 to 0.68 on a CPU).
SHARE_OF_RATE = {"cpu": 0.45, "cuda": 0.5}
#: Seconds per layer and step to launch its kernels, however small they are: 28 layers took 0.2 s on an H200's host.
SECONDS_A_LAYER = {"cpu": 0.003, "cuda": 0.0073}


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """The memory of the heaviest step.

    parts       name → bytes
    recomputed  share of the layers, 0 to 1, whose activations are recomputed in the backward pass
    """

    parts: dict[str, int]
    recomputed: float

    @property
    def peak(self) -> int:
        """Bytes of all parts together: all are allocated when the backward pass begins."""
        return sum(self.parts.values())

    @property
    def loaded(self) -> int:
        """Bytes in use when a run decides which activations to keep: after loading the model, before the first step."""
        return sum(self.parts[name] for name in ("base", "adapter", "libraries"))


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """Everything besides the model that decides the memory of a step.

    tokens         computed in the heaviest step
    element_bytes  bytes per weight of the base's dtype
    libraries      bytes of the process before any tensor, or of CUDA's context
    row_tokens     tokens of a typical row, on a CPU
    lengths        number of different row lengths in the run, on a CPU; 0 on a GPU, which caches nothing for them
    attention_weights  whether they may be kept for the backward pass, as on a CPU for packed and tree rows
    """

    tokens: int
    element_bytes: int
    quantize: Quantize | None
    dropout: bool
    dora: bool = False
    libraries: int
    row_tokens: int = 0
    lengths: int = 0
    attention_weights: bool = False


def step_memory(size: ModelSize, step: StepSpec, *, recomputed: float) -> StepMemory:
    """The memory of a step, part by part. Recomputed layers keep only their inputs, but at least one layer is in full.

    recomputed  share of the layers, 0 to 1
    """
    quantized = size.quantized if step.quantize else 0
    weights = (size.weights - quantized) * step.element_bytes
    if step.quantize:
        weights += round(quantized * QUANTIZED_BYTES[step.quantize])
    activations = activation_bytes(
        size.config,
        tokens=step.tokens,
        element_bytes=step.element_bytes,
        dropout=step.dropout,
        dora=step.dora,
        attention_weights=step.attention_weights,
    )
    if recomputed and size.layers:
        inputs = input_bytes(size.config, tokens=step.tokens, element_bytes=step.element_bytes)
        kept = max(1 - recomputed, 1 / size.layers)
        activations = round(activations * kept + inputs * recomputed)
    parts = {
        message("base"): weights,
        message("adapter"): size.trained * ADAPTER_BYTES,
        message("gradients"): size.trained * GRADIENT_BYTES,
        message("optimizer"): size.trained * ADAM_BYTES,
        message("activations"): activations,
        message("logits"): _logits(size, step),
        message("kernels"): _kernels(size, step),
        message("libraries"): step.libraries,
    }
    return StepMemory(parts=parts, recomputed=recomputed)


def _logits(size: ModelSize, step: StepSpec) -> int:
    """Bytes of the logits of the targets that are computed at once, and of their gradient.

    A GPU computes more targets at once if it has memory left, which is not counted here.
    """
    words = int(getattr(size.text, "vocab_size", None) or 0)
    return min(targets_at_once(max(words, 1), torch.device("cpu")), step.tokens) * words * BYTES_A_LOGIT


def _kernels(size: ModelSize, step: StepSpec) -> int:
    """Bytes that torch caches on a CPU for the different row lengths."""
    if not step.lengths or not size.shapes:
        return 0
    kept = min(step.lengths, PRODUCTS_KEPT // (PRODUCTS_A_MATRIX * len(size.shapes)))
    return kept * KERNEL_BYTES * step.row_tokens * sum(inputs + outputs for inputs, outputs in size.shapes)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The amount of computation of a run."""

    steps: int
    tokens: int  # computed in all steps together
    targets: int  # learned tokens
    mean_context: float  # number of tokens that a token sees on average
    dora: bool = False


def operations(size: ModelSize, work: Work, *, recomputed: float) -> float:
    """Floating-point operations of a run.

    Multiplying T tokens with N weights takes 2 N T. For frozen weights this is done twice: forward, and backward for
    the gradient of the layer's input; for LoRA weights three times; for recomputed layers once more. Attention takes
    12 C H per layer and token (Chowdhery et al. 2022, arXiv 2204.02311, appendix B). PEFT's DoRA multiplies with the
    frozen weights twice, for its inputs with and without dropout.
    """
    frozen = size.body * (2 if work.dora else 1)
    products = 2.0 * work.tokens * ((2 + recomputed) * frozen + 3 * size.trained)
    hidden = int(getattr(size.text, "hidden_size", 0))
    attention = 12.0 * work.tokens * work.mean_context * hidden * size.layers
    return products + attention + 4.0 * work.targets * size.head


def seconds(size: ModelSize, work: Work, *, recomputed: float, kind: str, rate: float) -> float:
    """Seconds of the training loop.

    kind  of the device: cpu, or anything else for a GPU
    rate  its matmul rate in operations per second, as `matmul_rate` measures it
    """
    kind = "cpu" if kind == "cpu" else "cuda"
    computing = operations(size, work, recomputed=recomputed) / (rate * SHARE_OF_RATE[kind])
    issuing = work.steps * size.layers * SECONDS_A_LAYER[kind]
    return max(computing, issuing) if kind == "cuda" else computing + issuing


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of square matrix products, the best of five; takes about a second."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    best = math.inf
    for _ in range(5):
        _wait(device)
        began = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fits_on_gpu(memory: StepMemory, gigabytes: int) -> bool:
    """Whether a step fits on a card sold with this many GB (2^30 bytes each)."""
    return memory.peak <= FILLED * gigabytes * 2**30
