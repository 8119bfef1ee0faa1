"""LoRA targets: which layers of a base the names in --lora_targets mean."""

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from atomtune.errors import BadModel, BadSettings
from atomtune.model.causal_lm import CausalLM
from atomtune.model.recurrent import as_in_training

ALL_LINEAR = "all-linear"


def linear_names(base: CausalLM) -> list[str]:
    """Full names of the layers that are linear, the output layer left out."""
    head = base.get_output_embeddings()
    names = []
    for name, module in base.named_modules():
        if module is head or _last_part(name) == "lm_head":
            continue
        if isinstance(module, nn.Linear | Conv1D):  # Conv1D is GPT-2's linear layer, its matrix transposed
            names.append(name)
    return names


@dataclass(frozen=True)
class AllLinear:
    """What all-linear means for a base.

    adapted    full names of the linear layers that LoRA reaches
    left_out   last part of a name → why layers of that name stay as they are
    """

    adapted: tuple[str, ...]
    left_out: Mapping[str, str]


def all_linear(base: CausalLM) -> AllLinear:
    """Every linear layer but the output layer, without those that an adapter would not reach or PEFT does not take."""
    names = linear_names(base)
    modules = dict(base.named_modules())
    called = _called_kinds(base, names)
    adapted, left_out = [], {}
    for name in names:
        last = _last_part(name)
        if _is_router(modules[name]):
            left_out[last] = "a router"
        elif called is not None and _kind(modules, name) not in called:
            left_out[last] = "not called for text"
        elif not _peft_takes(base.config.model_type, last):
            left_out[last] = "PEFT does not adapt it in this architecture"
        else:
            adapted.append(name)
    return AllLinear(tuple(adapted), left_out)


def _is_router(module: nn.Module) -> bool:
    """Whether this linear layer returns something else than its output (the routers of Llama 4 and Phi-MoE)."""
    of_an_architecture = type(module).__module__.startswith("transformers.models.")
    return of_an_architecture and isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def _kind(modules: Mapping[str, nn.Module], name: str) -> tuple[type, str]:
    parent, _, last = name.rpartition(".")
    return type(modules[parent]), last


def _called_kinds(base: CausalLM, names: Sequence[str]) -> set[tuple[type, str]] | None:
    """The kinds of linear layers that a text of four tokens calls; None where the base cannot be called so.

    Not called are a vision tower, and layers whose weights a model reads by itself (Jamba's dt_proj). A kind is called
    when one of its layers is: four tokens do not reach every expert.
    """
    modules = dict(base.named_modules())
    called: set[tuple[type, str]] = set()
    hooks = []
    for name in names:
        note = partial(_note, called, _kind(modules, name))
        hooks.append(modules[name].register_forward_pre_hook(note))
    training = base.training
    base.eval()
    try:
        with as_in_training(base):
            embeddings: Any = base.get_input_embeddings()
            base(input_ids=torch.arange(3, 7, device=embeddings.weight.device)[None], use_cache=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError):
        return None
    finally:
        base.train(training)
        for hook in hooks:
            hook.remove()
    return called


def _note(called: set[tuple[type, str]], kind: tuple[type, str], *_call: Any) -> None:
    called.add(kind)


class _StandIn(nn.Module):
    """A model of an architecture with a single linear layer of a name."""

    def __init__(self, model_type: str, name: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        self.add_module(name, nn.Linear(2, 2))


@cache
def _peft_takes(model_type: str, name: str) -> bool:
    """Whether PEFT puts LoRA on a layer of this name in this architecture, and on that layer.

    It refuses some of Mamba's, which fast kernels read without calling. In architectures whose experts were linear
    layers once, `gate_proj` and its like mean the experts' joint matrices to it, dense layers of that name included.
    """
    config = LoraConfig(target_modules=[name], r=1)
    try:
        # The stand-in's random numbers are none of the run's: its adapter begins as it would without this question.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            adapted = get_peft_model(_StandIn(model_type, name), config)
    except (ValueError, KeyError):
        return False
    return any("lora_A" in weight for weight, _ in adapted.named_parameters())


def match_targets(base: CausalLM, targets: Sequence[str]) -> dict[str, int]:
    """How many modules each target name matches; for all-linear, every kind of linear layer and its count.

    Raises BadSettings when a named target matches none, with the names that exist, and when it matches what LoRA
    cannot adapt here: an embedding, a whole block, or an output layer that is the embedding (tied weights).
    """
    if list(targets) == [ALL_LINEAR]:
        adapted = Counter(_last_part(name) for name in all_linear(base).adapted)
        if not adapted:
            raise BadModel("The base has no linear layer that LoRA could adapt.")
        return dict(sorted(adapted.items()))
    kinds = Counter(_last_part(name) for name in linear_names(base))
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
