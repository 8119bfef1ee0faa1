"""LoRA targets: which layers of a base the names in --lora_targets mean."""

from collections import Counter
from collections.abc import Collection, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from atomtune.errors import BadModel, BadSettings
from atomtune.model.causal_lm import CausalLM

ALL_LINEAR = "all-linear"


def linear_names(base: CausalLM) -> list[str]:
    """Full names of the layers LoRA can adapt, the output layer left out."""
    head = base.get_output_embeddings()
    names = []
    for name, module in base.named_modules():
        if module is head or _last_part(name) == "lm_head":
            continue
        if isinstance(module, nn.Linear | Conv1D):  # Conv1D is GPT-2's linear layer, its matrix transposed
            names.append(name)
    return names


def match_targets(base: CausalLM, targets: Sequence[str]) -> dict[str, int]:
    """How many modules each target name matches; for all-linear, every kind of linear layer and its count.

    Raises BadSettings when a named target matches none, with the names that exist.
    """
    kinds = Counter(_last_part(name) for name in linear_names(base))
    if list(targets) == [ALL_LINEAR]:
        if not kinds:
            raise BadModel("The base has no linear layer that LoRA could adapt.")
        return dict(sorted(kinds.items()))
    counts = {target: len(matched(base, [target])) for target in targets}
    missing = [target for target, count in counts.items() if not count]
    if missing:
        linear = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
        raise BadSettings(
            [f"--lora_targets: no module is called {', '.join(missing)}. Linear layers of this model: {linear}."]
        )
    return counts


def matched(base: CausalLM, targets: Collection[str]) -> set[str]:
    """The full names of the modules that target names mean: `q_proj` is every module whose name ends so."""
    names = set()
    for name, _ in base.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in targets):
            names.add(name)
    return names


def shortest(base: CausalLM, modules: set[str]) -> list[str]:
    """The last parts of module names where these match just the given modules, else the full names."""
    parts = sorted({_last_part(name) for name in modules})
    if {name for name, _ in base.named_modules() if _last_part(name) in parts} == modules:
        return parts
    return sorted(modules)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
