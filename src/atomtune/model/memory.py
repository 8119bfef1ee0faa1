"""Memory: what a step needs, what there is, and what to change when it was too much.

The estimate decides only whether activations are kept or recomputed (`--gradient_checkpointing auto`); it errs on the
side of recomputing, which costs about a third of speed, where keeping too much costs the run.
"""

import resource
import sys
from dataclasses import dataclass
from typing import Any

import psutil
import torch

# Part of the free memory that activations may take: the rest is for fragmentation, the loss and the optimizer.
USABLE = 0.6


def activation_bytes(config: Any, *, tokens: int, element_bytes: int) -> int:
    """Bytes kept for the backward pass of one step without checkpointing.

    Per token and layer, in units of one element: 14 of hidden size (two norms with their float32 copies, q, k, v,
    attention's output and its input to LoRA) and 6 of the intermediate size (gate, up, their product and the copies
    LoRA's dropout makes); counted after Korthikanti et al. 2022 (arXiv 2205.05198), section 4, for a LoRA Llama.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = getattr(text, "hidden_size", 0)
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    layers = getattr(text, "num_hidden_layers", 0)
    return tokens * layers * (14 * hidden + 6 * inner) * element_bytes


def free_bytes(device: torch.device) -> int:
    """Memory a step may still take on this device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def should_checkpoint(config: Any, *, tokens: int, element_bytes: int, device: torch.device) -> bool:
    """Whether activations of a step of so many tokens had better be recomputed."""
    return activation_bytes(config, tokens=tokens, element_bytes=element_bytes) > USABLE * free_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """Highest memory use so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a device or the machine running out of memory."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said.lower())
    )


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The figures of a run that decide its memory."""

    batch: int
    accumulation: int
    max_seq_length: int
    longest_tokens: int
    checkpointing: bool
    quantize: str | None
    on_gpu: bool
    peak: int


def remedies(shape: StepShape) -> str:
    """What to change, in the order of least loss, with this run's figures."""
    lines = [
        f"Out of memory. The run's peak before that was {shape.peak / 2**30:.1f} GiB at batch {shape.batch}, longest "
        f"example {shape.longest_tokens} tokens. What to change, in the order of least loss:"
    ]
    steps: list[str] = []
    if not shape.checkpointing:
        steps.append("--gradient_checkpointing true: the same result, about a third slower.")
    if shape.batch > 1:
        half, twice = max(1, shape.batch // 2), shape.accumulation * shape.batch // max(1, shape.batch // 2)
        steps.append(
            f"--per_device_train_batch_size {half} --gradient_accumulation_steps {twice}: the same updates, "
            f"smaller pieces (now {shape.batch} × {shape.accumulation})."
        )
    if shape.quantize is None:
        where = "" if shape.on_gpu else " (slower on a CPU)"
        steps.append(f"--quantize nf4: the base in a quarter of the memory, slightly less exact{where}.")
    if shape.longest_tokens > 128:
        steps.append(
            f"--max_seq_length {max(128, shape.longest_tokens // 2)}: shortens the prompts of longer records "
            f"(now {shape.max_seq_length})."
        )
    steps.append("--lora_targets with fewer layers, or a smaller base.")
    return "\n".join([*lines, *(f"  {n}. {step}" for n, step in enumerate(steps, 1)), "Then go on with --resume."])
