"""Memory: what a step needs, what is free, and what to change when it was too much.

The estimate only decides how many layers are recomputed (`--gradient_checkpointing auto`). It errs on the side of
recomputing: for all layers that costs a third to two fifths of the speed, but running out of memory costs the run.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from rich.filesize import decimal

from atomtune import container
from atomtune.limits import most_memory_held
from atomtune.model.block_attention import MOST_KEPT

#: Share of the free memory that activations may take. The rest is for the loss, the optimizer and fragmentation, and on
#: a CPU for other programs.
USABLE_ON_GPU, USABLE = 0.85, 0.6
#: If some layers are recomputed, the others may take only this part of that share: such a run is always at its limit.
FILLED_BY_CHOICE = 0.85
#: Bytes that PEFT's DoRA keeps for each output of an adapted matrix: five numbers in float32. A step of 432 tokens on
#: SmolLM2-135M took 1.36 GB more with it; this gives 1.39.
DORA_BYTES = 20


def activation_bytes(
    config: Any,
    *,
    tokens: int,
    element_bytes: int,
    dropout: bool = False,
    dora: bool = False,
    attention_weights: bool = False,
) -> int:
    """Bytes kept for the backward pass of one step of `tokens` computed tokens, if nothing is recomputed.

    On a Qwen2.5-7B shape in bfloat16 without dropout this gives 6.5 MB per token; an H100 took 6.3.
    """
    _, layers, _ = _shape(config)
    of_layers = layer_bytes(
        config, element_bytes=element_bytes, dropout=dropout, dora=dora, attention_weights=attention_weights
    )
    return tokens * layers * sum(of_layers) // len(of_layers)


def layer_bytes(
    config: Any, *, element_bytes: int, dropout: bool = False, dora: bool = False, attention_weights: bool = False
) -> Sequence[int]:
    """Bytes per token that each layer keeps for the backward pass; a single number if all layers are alike.

    In units of one element:
    11 x hidden size        two norms in float32 (4), their outputs (2), the rotated queries, and the keys and values
                            repeated for all heads (3), attention's output, and the output projection's input (2)
    4 x inner size          gate, up, the activated gate, their product
    with attention weights  block_attention.MOST_KEPT x hidden size: on a CPU they are kept up to this size
    with LoRA dropout       one byte per input: 3 x hidden size, 1 x inner size
    with DoRA               DORA_BYTES per output: 4 x hidden size, 2 x inner size
    """
    text, _, hidden = _shape(config)
    inner_sizes = getattr(text, "intermediate_size", None) or 4 * hidden
    if not isinstance(inner_sizes, list | tuple):  # Gemma 3n has a size for each layer
        inner_sizes = [inner_sizes]
    weights = MOST_KEPT * hidden if attention_weights else 0
    of_layers = []
    for inner in inner_sizes:
        saved = (11 * hidden + 4 * inner + weights) * element_bytes
        dropped = 3 * hidden + inner if dropout else 0
        of_dora = DORA_BYTES * (4 * hidden + 2 * inner) if dora else 0
        of_layers.append(saved + dropped + of_dora)
    return of_layers


def input_bytes(config: Any, *, tokens: int, element_bytes: int) -> int:
    """Bytes of the inputs of all layers, which are kept even if every layer is recomputed."""
    _, layers, hidden = _shape(config)
    return tokens * layers * hidden * element_bytes


def _shape(config: Any) -> tuple[Any, int, int]:
    """(config of the language model, number of layers, hidden size)."""
    text = config.get_text_config()
    return text, getattr(text, "num_hidden_layers", 0) or 0, getattr(text, "hidden_size", 0) or 0


def layers_to_recompute(layers: int, *, kept: int, inputs: int, room: float) -> int:
    """The smallest number of layers to recompute so that a step fits; all if even that is not enough.

    kept    bytes that all layers keep if none is recomputed
    inputs  bytes of their inputs, which recomputed layers keep
    room    bytes that are available
    """
    if kept <= room:
        return 0
    saved_by_one = (kept - inputs) / layers
    return min(layers, math.ceil((kept - FILLED_BY_CHOICE * room) / saved_by_one))


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a step may still take on this device; None if the system does not report it."""
    if device.type == "cuda":
        return free_on_gpu(device)
    return _tighter(_or_none(lambda: psutil.virtual_memory().available), container.memory_left())


def free_on_gpu(device: torch.device) -> int:
    """The same for a GPU, including memory that torch has reserved and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def machine_bytes() -> int | None:
    """Total memory of this machine, or of its container, in bytes; None if the system does not report it."""
    return _tighter(_or_none(lambda: psutil.virtual_memory().total), container.memory_limit())


def held_bytes() -> int | None:
    """Bytes of memory that this process holds now; None if the system does not report it."""
    return _or_none(lambda: psutil.Process().memory_info().rss)


def mapped_bytes() -> int:
    """The part of them that is mapped files, such as libraries, which `free_bytes` counts as free; 0 if unknown."""
    return _or_none(lambda: getattr(psutil.Process().memory_info(), "shared", 0)) or 0  # only Linux tells them apart


def _tighter(of_machine: int | None, of_container: int | None) -> int | None:
    return min((size for size in (of_machine, of_container) if size is not None), default=None)


def _or_none(question: Callable[[], int]) -> int | None:
    """The answer of psutil; None if it fails, for example in a container where /proc is not mounted or not readable."""
    try:
        return int(question())
    except (psutil.Error, OSError, LookupError, ValueError, RuntimeError):
        return None


@dataclass(frozen=True, slots=True)
class ActivationMemory:
    """What decides how many layers are recomputed.

    tokens   computed tokens of the heaviest step that is expected
    needed   bytes that such a step keeps if nothing is recomputed
    inputs   bytes of the inputs of all layers in such a step
    layers   number of layers
    free     free bytes of the device; None if the system does not report it
    usable   share of `free` that activations may take
    """

    tokens: int
    needed: int
    inputs: int
    layers: int
    free: int | None
    usable: float

    @classmethod
    def of(
        cls,
        config: Any,
        *,
        tokens: int,
        element_bytes: int,
        dropout: bool,
        dora: bool = False,
        in_rows: bool,
        device: torch.device,
    ) -> "ActivationMemory":
        """The estimate. in_rows: records share rows, whose attention keeps its weights on a CPU; padded rows do not."""
        needed = activation_bytes(
            config,
            tokens=tokens,
            element_bytes=element_bytes,
            dropout=dropout,
            dora=dora,
            attention_weights=in_rows and device.type == "cpu",
        )
        return cls(
            tokens=tokens,
            needed=needed,
            inputs=input_bytes(config, tokens=tokens, element_bytes=element_bytes),
            layers=_shape(config)[1],
            free=free_bytes(device),
            usable=USABLE_ON_GPU if device.type == "cuda" else USABLE,
        )

    @property
    def fits(self) -> bool:
        """Whether a step can keep all its activations; False if the free memory is unknown."""
        return self.free is not None and self.needed <= self.usable * self.free

    @property
    def layers_to_recompute(self) -> int:
        """How many layers have to be recomputed: 0 if a step fits as it is, all if the free memory is unknown."""
        if self.free is None:
            return self.layers
        room = self.usable * self.free
        return layers_to_recompute(self.layers, kept=self.needed, inputs=self.inputs, room=room)

    def __str__(self) -> str:
        needed = decimal(self.needed)
        if self.free is None:
            return f"a step of {self.tokens:,} tokens keeps {needed}; this system does not say how much memory is free"
        return f"a step of {self.tokens:,} tokens keeps {needed}, {decimal(self.free)} is free"


def peak_bytes(device: torch.device) -> int:
    """Peak memory in bytes so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    most = most_memory_held()
    if most is not None:
        return most
    return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]  # Windows only


def free_memory() -> None:
    """Free the memory of deleted models, whose parts often refer to each other, before another one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine ran out of memory."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text.lower())
    )


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The settings of a run that decide its memory; checkpointing: whether all layers are recomputed; peak in bytes."""

    batch: int
    accumulation: int
    max_seq_length: int
    longest_tokens: int
    checkpointing: bool
    quantize: str | None
    on_gpu: bool
    peak: int


def remedies(shape: StepShape) -> str:
    """The message of a run that is out of memory, with what to change."""
    lines = [
        f"Out of memory. The run's peak before that was {decimal(shape.peak)} at batch {shape.batch}, longest "
        f"example {shape.longest_tokens} tokens. What to change, the least costly first:",
        *ways_to_save(shape),
    ]
    if shape.checkpointing:
        lines.append("Then continue with --resume --resume_anyway; other layers or another base need a new run.")
    else:
        lines.append(
            "Then continue with --resume; all but --gradient_checkpointing also need --resume_anyway, and other layers "
            "or another base a new run."
        )
    return "\n".join(lines)


def ways_to_save(shape: StepShape) -> list[str]:
    """What to change for less memory, the least costly first; numbered lines with this run's figures."""
    steps: list[str] = []
    if not shape.checkpointing:
        steps.append("--gradient_checkpointing true: the same result, about a third slower.")
    if shape.batch > 1:
        in_a_step = shape.batch * shape.accumulation
        smaller = next(size for size in range(shape.batch // 2, 0, -1) if in_a_step % size == 0)
        more = in_a_step // smaller
        steps.append(
            f"--per_device_train_batch_size {smaller} --gradient_accumulation_steps {more}: the same updates, "
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
    return [f"  {n}. {step}" for n, step in enumerate(steps, 1)]
