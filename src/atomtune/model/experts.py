"""Experts: which weights of a base belong to experts, of which each token uses a few, and how LoRA adapts them.

They are found by their shape, not by a list of architectures: one tensor holds a matrix for every expert of a layer,
and the config says how many experts there are. Models with their own code may hold them as linear layers in a list
named `experts`. PEFT adapts tensors outside of linear layers through `target_parameters`: it adds B A to the tensor
before each use, which leaves no place for dropout.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Experts:
    """The experts of a base.

    tensors  full names of weights that hold a matrix for each expert, [experts, …, …]
    layers   full names of linear layers that belong to one expert each
    share    of all the base's weights that belong to experts, 0 to 1
    """

    tensors: tuple[str, ...]
    layers: tuple[str, ...]
    share: float

    def __bool__(self) -> bool:
        return bool(self.tensors or self.layers)


def experts_of(base: Any) -> Experts:
    """Find the experts of a base that has no adapter yet."""
    counts = numbers_of_experts(base.config)
    modules = dict(base.named_modules())
    weights = {name: count_of(weight) for name, weight in base.named_parameters()}
    tensors = []
    for name, weight in base.named_parameters():
        holder = modules[name.rpartition(".")[0]]
        if weight.dim() == 3 and weight.shape[0] in counts and not isinstance(holder, nn.Conv1d):
            tensors.append(name)
    layers = []
    for name, module in modules.items():
        if isinstance(module, nn.Linear | Conv1D) and "experts" in name.split("."):
            layers.append(name)
    holders = set(layers)  # DeepSeek-V3's own code has 45,000
    of_layers = [name for name in weights if name.rpartition(".")[0] in holders]
    share = sum(weights[name] for name in (*tensors, *of_layers)) / sum(weights.values())
    return Experts(tuple(tensors), tuple(layers), share)


def numbers_of_experts(config: Any) -> set[int]:
    """All values in the config that may be the number of experts: num_experts, n_routed_experts, num_local_experts, …

    Some configs have a list with one number per layer (Hunyuan).
    """
    numbers: set[int] = set()
    for name, value in config.get_text_config().to_dict().items():
        if "expert" in name:
            of_layers = value if isinstance(value, list | tuple) else [value]
            numbers.update(number for number in of_layers if type(number) is int and number > 1)
    return numbers


def count_of(weight: Any) -> int:
    """How many numbers a weight holds; a 4-bit weight counts with its unpacked size."""
    return math.prod(getattr(getattr(weight, "quant_state", None), "shape", weight.shape))


def endings(base: nn.Module, parameters: Iterable[str]) -> list[str]:
    """Short names for `target_parameters`: the last two parts if they match only the given weights, else full names."""
    wanted = set(parameters)
    ends = sorted({".".join(name.split(".")[-2:]) for name in wanted})
    meant = {name for name, _ in base.named_parameters() if name.endswith(tuple(f".{end}" for end in ends))}
    return ends if meant == wanted else sorted(wanted)
