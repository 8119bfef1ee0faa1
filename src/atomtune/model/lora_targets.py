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

    Raises BadSettings when a named target matches none, with the names that exist, and when it matches what LoRA
    cannot adapt here: an embedding, a whole block, or an output layer that is the embedding (tied weights).
    """
    kinds = Counter(_last_part(name) for name in linear_names(base))
    if list(targets) == [ALL_LINEAR]:
        if not kinds:
            raise BadModel("The base has no linear layer that LoRA could adapt.")
        return dict(sorted(kinds.items()))
    counts = {target: len(matched(base, [target])) for target in targets}
    problems = []
    if missing := [target for target, count in counts.items() if not count]:
        problems.append(f"--lora_targets: no module is called {', '.join(missing)}.")
    for target in targets:
        problems += _unfit(base, target)
    if problems:
        linear = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
        raise BadSettings([*problems, f"Linear layers of this model: {linear}."])
    return counts


def _unfit(base: CausalLM, target: str) -> list[str]:
    """What is wrong with the modules that a target matches, said once."""
    names = matched(base, [target])
    head = base.get_output_embeddings()
    tied = head is not None and head.weight is getattr(base.get_input_embeddings(), "weight", None)
    for name, module in base.named_modules():
        if name not in names:
            continue
        if not isinstance(module, nn.Linear | Conv1D):
            return [f"--lora_targets {target}: {name} is a {type(module).__name__}; LoRA adapts linear layers here."]
        if tied and module is head:
            return [
                f"--lora_targets {target}: in this model the output layer and the embedding are one matrix, so an "
                "adapter of one of them could not be merged."
            ]
    return []


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
