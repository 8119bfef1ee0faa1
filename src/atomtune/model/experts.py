"""Experts: which weights of a base belong to experts, of which each token uses a few, and how LoRA goes on them.

Found by their shape, not by a list of architectures: one tensor holds a matrix for every expert of a layer, and the
config says how many experts there are. Models that bring their own code may hold them as linear layers in a list
`experts`. PEFT adapts a tensor that is no layer through `target_parameters`: it adds B A to it before each use, where
no dropout can be.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Experts:
    """The experts of a base.

    tensors  full names of weights that hold a matrix for each expert
    layers   full names of linear layers of which each is one expert's
    share    of all weights of the base
    """

    tensors: tuple[str, ...]
    layers: tuple[str, ...]
    share: float

    def __bool__(self) -> bool:
        return bool(self.tensors or self.layers)


def experts_of(base: Any) -> Experts:
    """Look for experts in a base that has no adapter yet."""
    counts = numbers_of_experts(base.config)
    modules = dict(base.named_modules())
    weights = {name: count_of(weight) for name, weight in base.named_parameters()}
    tensors = []
    for name, weight in base.named_parameters():
        holder = modules[name.rpartition(".")[0]]
        if weight.dim() == 3 and weight.shape[0] in counts and not isinstance(holder, nn.Conv1d):
            tensors.append(name)
    layers: dict[str, None] = {}  # in order; DeepSeek-V3's own code has 45,000
    for name, module in modules.items():
        if isinstance(module, nn.Linear | Conv1D) and "experts" in name.split("."):
            layers[name] = None
    of_layers = [name for name in weights if name.rpartition(".")[0] in layers]
    share = sum(weights[name] for name in (*tensors, *of_layers)) / sum(weights.values())
    return Experts(tuple(tensors), tuple(layers), share)


def numbers_of_experts(config: Any) -> set[int]:
    """What the config may mean by a number of experts: num_experts, n_routed_experts, num_local_experts, …; or one for
    each layer (Hunyuan).
    """
    numbers: set[int] = set()
    for name, value in config.get_text_config().to_dict().items():
        if "expert" in name:
            of_layers = value if isinstance(value, list | tuple) else [value]
            numbers.update(number for number in of_layers if type(number) is int and number > 1)
    return numbers


def count_of(weight: Any) -> int:
    """Numbers in a weight; a 4-bit one counts as the numbers it stands for."""
    shape = getattr(getattr(weight, "quant_state", None), "shape", weight.shape)
    count = 1
    for length in shape:
        count *= length
    return count


def endings(base: nn.Module, parameters: Iterable[str]) -> list[str]:
    """Short names for `target_parameters`: the last two parts where these mean just the given weights, else all."""
    wanted = set(parameters)
    ends = sorted({".".join(name.split(".")[-2:]) for name in wanted})
    meant = {name for name, _ in base.named_parameters() if name.endswith(tuple(f".{end}" for end in ends))}
    return ends if meant == wanted else sorted(wanted)
