"""Estimate: from counts of tokens and weights to bytes and seconds.

Pure arithmetic, so that each figure can be followed by hand. Letters: N weights, T tokens, C tokens that may be seen,
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

#: Bytes a weight: nf4 with its scales quantized too (QLoRA, Dettmers et al. 2023, arXiv 2305.14314: 4.127 bits); int8.
QUANTIZED_BYTES: dict[Quantize, float] = {"nf4": 4.127 / 8, "int8": 1.0}
#: LoRA's weights, their gradients, and two states of Adam, all in float32.
ADAPTER_BYTES, GRADIENT_BYTES, ADAM_BYTES = 4, 4, 8
#: What CUDA itself takes before the first tensor, and the part of a card that a run can fill before it fragments.
CUDA_CONTEXT, FILLED = 600 * 2**20, 0.94

#: On a CPU torch keeps what oneDNN prepares for each new length of a row, up to so many products; a matrix brings six,
#: with its two of LoRA, forward and back. Bytes for each token and number that goes in or out: measured 7 to 12
#: (docs/log.md, widths 512 to 1,536).
PRODUCTS_KEPT, PRODUCTS_A_MATRIX, KERNEL_BYTES = 1024, 6, 9

#: Of the machine's rate of matrix products, what a step reaches (benchmarks/README.md: 0.33 to 0.68 on a CPU).
SHARE_OF_RATE = {"cpu": 0.45, "cuda": 0.5}
#: However little a layer computes, its kernels have to be issued: a step of 28 layers took 0.2 s on an H200's host.
SECONDS_A_LAYER = {"cpu": 0.003, "cuda": 0.0073}


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Where the memory of the heaviest step goes.

    parts       name → bytes
    recomputed  share of the layers whose activations are computed a second time in the backward pass
    """

    parts: dict[str, int]
    recomputed: float

    @property
    def peak(self) -> int:
        """Bytes of all parts, which are all there when the backward pass begins."""
        return sum(self.parts.values())

    @property
    def loaded(self) -> int:
        """Bytes that are there when a run decides which activations it keeps: the model is loaded, no step is made."""
        return sum(self.parts[name] for name in ("base", "adapter", "libraries"))


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """What decides the memory of a step besides the model.

    tokens        computed in the heaviest step
    element_bytes of a number in the base's format
    libraries     bytes of the process before any tensor, or of CUDA's context
    row_tokens    of a row of usual length, on a CPU
    lengths       how many lengths of rows the run meets there; 0 on a GPU, which keeps nothing for them
    attention_weights  whether they may be kept for the backward pass, as those of rows are on a CPU
    """

    tokens: int
    element_bytes: int
    quantize: Quantize | None
    dropout: bool
    libraries: int
    row_tokens: int = 0
    lengths: int = 0
    attention_weights: bool = False


def step_memory(size: ModelSize, step: StepSpec, *, recomputed: float) -> StepMemory:
    """Bytes by part. Of recomputed layers the inputs are left, and one layer whole where all are recomputed."""
    quantized = size.quantized if step.quantize else 0
    weights = (size.weights - quantized) * step.element_bytes
    if step.quantize:
        weights += round(quantized * QUANTIZED_BYTES[step.quantize])
    activations = activation_bytes(
        size.config,
        tokens=step.tokens,
        element_bytes=step.element_bytes,
        dropout=step.dropout,
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

    A GPU takes more at once where it has memory left.
    """
    words = int(getattr(size.text, "vocab_size", None) or 0)
    return min(targets_at_once(max(words, 1), torch.device("cpu")), step.tokens) * words * BYTES_A_LOGIT


def _kernels(size: ModelSize, step: StepSpec) -> int:
    """Bytes of what a CPU keeps for the lengths of rows it has met."""
    if not step.lengths or not size.shapes:
        return 0
    kept = min(step.lengths, PRODUCTS_KEPT // (PRODUCTS_A_MATRIX * len(size.shapes)))
    return kept * KERNEL_BYTES * step.row_tokens * sum(inputs + outputs for inputs, outputs in size.shapes)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run computes."""

    steps: int
    tokens: int  # in the rows of all steps
    targets: int  # that are learned
    mean_context: float  # tokens that a token may see


def operations(size: ModelSize, work: Work, *, recomputed: float) -> float:
    """Floating-point operations of a run.

    A product of T tokens with N weights is 2 N T. Frozen weights have it twice, forward and for the gradient of what is
    below them; LoRA's weights three times; those of recomputed layers once more. Attention takes 12 C H a layer and
    token (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    products = 2.0 * work.tokens * ((2 + recomputed) * size.body + 3 * size.trained)
    hidden = int(getattr(size.text, "hidden_size", 0))
    attention = 12.0 * work.tokens * work.mean_context * hidden * size.layers
    return products + attention + 4.0 * work.targets * size.head


def seconds(size: ModelSize, work: Work, *, recomputed: float, kind: str, rate: float) -> float:
    """Of the training loop on a device of this kind whose matrix products reach `rate` operations a second."""
    kind = "cpu" if kind == "cpu" else "cuda"
    computing = operations(size, work, recomputed=recomputed) / (rate * SHARE_OF_RATE[kind])
    issuing = work.steps * size.layers * SECONDS_A_LAYER[kind]
    return max(computing, issuing) if kind == "cuda" else computing + issuing


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of square products, the best of a few: takes about a second."""
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
    """Whether a step of this size runs on a card sold with so many GB (2^30 bytes each)."""
    return memory.peak <= FILLED * gigabytes * 2**30
