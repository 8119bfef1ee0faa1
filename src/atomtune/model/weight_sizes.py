"""Weight sizes: whether a config.json and the weight files beside it describe the same model.

Checked before any memory is allocated: a config with a wrong size describes a model of terabytes or of 10^9 layers,
which a library would begin to build. Only the headers of the weight files are read.
"""

import math
from pathlib import Path
from typing import Any

import torch

from atomtune.errors import BadModel, listing
from atomtune.model.auto_class import auto_class
from atomtune.model.causal_lm import CausalLM
from atomtune.model.fingerprint import stored_weights

#: A model may have more parameters than its files have numbers (a tied matrix, buffers), but not twice as many.
_MOST_TIMES = 2
#: How many parameters an integer of a packed weight may hold: 32.
_PACKED = 32
#: Values below this are never refused, because they cost no memory.
_HARMLESS = 1024
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def refuse_other_sizes(path: str, config: Any, files: list[Path], *, trust_remote_code: bool) -> None:
    """Raise BadModel if the config describes a model that is far larger than what the files hold.

    config  a transformers config
    """
    shapes: list[list[int]] = []
    stored = 0  # how many parameters the files hold at most
    for file in files:
        for _, shape, weight in stored_weights(file):
            shapes.append(shape)
            stored += math.prod(shape) * (1 if _is_floating_point(weight) else _PACKED)
    if not shapes:
        return
    tensors, largest = len(shapes), max(max(shape, default=0) for shape in shapes)
    text = config.get_text_config()
    problems = []
    for name, value in sorted(text.to_dict().items()):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        limit = tensors if name in _LAYERS else max(_HARMLESS, largest, tensors)
        if _is_count(name) and value > limit:
            problems.append(f"  {name} is {value:,}; the files hold {tensors:,} tensors, none longer than {largest:,}")
    if problems:
        raise BadModel(_not_together(path, problems))
    described = _parameters(config, trust_remote_code=trust_remote_code)
    if described > _MOST_TIMES * stored:
        raise BadModel(
            _not_together(path, [f"  it describes {described:,} parameters; the files hold {stored:,} numbers"])
        )


def _not_together(path: str, problems: list[str]) -> str:
    return (
        f"{path}: its config.json describes another model than the weight files hold.\n{listing(problems)}\n"
        "Use the files that were published together."
    )


def _is_count(name: str) -> bool:
    """Whether a setting counts layers, heads, experts, tokens or a width; numbers of positions take no memory."""
    counts = name.startswith(("num_", "n_")) or name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")
    return counts and not any(word in name for word in ("position", "ctx", "token", "steps"))


def without_weights(config: Any, *, trust_remote_code: bool) -> CausalLM:
    """The model that a config describes, on the device `meta`: with all its modules, and no memory for weights."""
    with torch.device("meta"):
        model: CausalLM = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    return model


def _parameters(config: Any, *, trust_remote_code: bool) -> int:
    """The number of parameters of a model with this config; 0 if it cannot be built, which loading reports better."""
    try:
        model = without_weights(config, trust_remote_code=trust_remote_code)
    except Exception:  # noqa: BLE001  # loading the model raises the same error again
        return 0
    return sum(weight.numel() for weight in model.parameters())


def _is_floating_point(weight: Any) -> bool:
    """Whether a stored weight, a tensor or a slice of safetensors, holds floating-point numbers."""
    if isinstance(weight, torch.Tensor):
        return weight.is_floating_point()
    return weight.get_dtype().startswith(("F8", "F16", "F32", "F64", "BF"))
