"""LoRA targets: which layers of a base the names in --lora_targets match."""

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from atomtune.errors import BadModel, BadSettings
from atomtune.language import message
from atomtune.limits import try_in_child_process
from atomtune.model.adapter_keys import text_modules
from atomtune.model.causal_lm import CausalLM
from atomtune.model.experts import experts_of, numbers_of_experts
from atomtune.model.modes import as_in_training, without_dropout

ALL_LINEAR = "all-linear"
#: A plain module name, as opposed to a regex.
_PLAIN = re.compile(r"[\w.-]*")


def linear_names(base: CausalLM) -> list[str]:
    """Full names of the linear layers, without the output layer."""
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

    adapted    full names of the linear layers that LoRA adapts
    left_out   reason by name of what stays frozen (the last part of a layer's name, or the name of a whole tower)
    shared     full names of layers that PEFT mistakes for experts' and adapts only as tensors: those of shared experts
               and of the first layers, which have no experts
    """

    adapted: tuple[str, ...]
    left_out: Mapping[str, str]
    shared: tuple[str, ...] = ()


def all_linear(base: CausalLM) -> AllLinear:
    """Every linear layer except the output layer, layers that an adapter would not affect, and those PEFT cannot adapt.

    Layers of experts are left to experts.py.
    """
    of_experts = set(experts_of(base).layers)
    names = [name for name in linear_names(base) if name not in of_experts]
    modules = dict(base.named_modules())
    called, learned = _called_and_learned(base, names)
    uncalled, without_gradient = set(unreached(names, called)), called - learned
    adapted, left_out, shared = [], {}, []
    for name in names:
        last = _last_part(name)
        if router := _router_of(base, name, modules):
            left_out[router] = message("a router")
        elif _is_gate_of_one(last, modules[name]):
            left_out[last] = "a gate with one output"
        elif not _is_plain(modules[name]):
            left_out[last] = "not computed like a linear layer"
        elif name in uncalled:
            left_out[_tower(name, called)] = "not called for text"
        elif name in without_gradient:
            left_out[last] = "without a gradient of the loss"
        elif not _peft_adapts(base.config.model_type, last):
            left_out[last] = "not adapted by PEFT in this architecture"
            if _peft_adapts(base.config.model_type, last, as_tensor=True):
                shared.append(name)
        else:
            adapted.append(name)
    return AllLinear(tuple(adapted), left_out, tuple(shared))


def _router_of(base: CausalLM, name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The last part of the name of the router that this linear layer is or is part of; None if it is neither.

    A router has "router" in its name or its class's (Llama 4, Phi-MoE, Zaya), or it is named `gate` and has an output
    for each expert (models with their own code), itself or in a layer inside it (Hunyuan's `gate.wg`).
    """
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = modules[".".join(parts[:depth])]
        if "router" in parts[depth - 1].lower() or "router" in type(module).__name__.lower():
            return parts[depth - 1]
        if parts[depth - 1] == "gate" and _has_an_output_for_each_expert(module, base):
            return parts[depth - 1]
    return None


def _is_gate_of_one(name: str, layer: nn.Module) -> bool:
    """Whether this is the gate of a shared expert, with one output. LoRA there is larger than the layer itself."""
    return "gate" in name and _outputs(layer) == 1


def _has_an_output_for_each_expert(gate: nn.Module, base: CausalLM) -> bool:
    counts = numbers_of_experts(base.config)
    return any(_outputs(layer) in counts for layer in gate.modules() if isinstance(layer, nn.Linear | Conv1D))


@torch.no_grad()
def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer whose class has its own forward computes x W^T + bias, to which LoRA adds.

    Falcon's does; the grouped one of DeepSeek V4 multiplies parts of its matrix with parts of its input.
    """
    if not isinstance(layer, nn.Linear) or not type(layer).__module__.startswith("transformers.models."):
        return True
    weight = layer.weight
    inputs = torch.linspace(-1, 1, 2 * layer.in_features).view(2, -1).to(weight)
    try:
        output = layer(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    expected = functional.linear(inputs, weight, layer.bias)
    if not isinstance(output, torch.Tensor) or output.shape != expected.shape:
        return False
    return weight.is_meta or bool((output - expected).norm() <= 0.1 * expected.norm())  # far above any rounding


def _outputs(module: nn.Module) -> int:
    """How many outputs a linear layer has per token."""
    return int(module.nf if isinstance(module, Conv1D) else module.out_features)  # type: ignore[arg-type]


def unreached(names: Iterable[str], reached: Collection[str]) -> list[str]:
    """The layers that no text reaches, given those that one short text reached.

    An expert that no token of that text chose may be reached by another text. It is recognised because nothing in
    `experts.3` was reached while the same layer of `experts.1` was. What remains: a vision tower, unused layers of a
    block (keys of a Gemma 3n layer that shares another's), and weights that a model reads without a call (Jamba's
    dt_proj).
    """
    blocks = {_block(name) for name in reached}
    in_any_block = {_in_any_block(name) for name in reached}
    missed = []
    for name in names:
        unchosen = _block(name) not in blocks and _in_any_block(name) in in_any_block
        if name not in reached and not unchosen:
            missed.append(name)
    return missed


def _block(name: str) -> str:
    """`layers.0.mlp.experts.3.w1` → `layers.0.mlp.experts.3`"""
    return name[: _innermost_number(name).end()]


def _in_any_block(name: str) -> str:
    """`layers.0.mlp.experts.3.w1` → `layers.0.mlp.experts.*.w1`"""
    number = _innermost_number(name)
    return f"{name[: number.start()]}*{name[number.end() :]}"


def _innermost_number(name: str) -> re.Match[str]:
    """The last numeric part of a name, or the empty match at the end of a name without one."""
    numbers = list(re.finditer(r"(?<![^.])\d+(?![^.])|$", name))
    return numbers[-2] if len(numbers) > 1 else numbers[-1]


def _called_and_learned(base: CausalLM, names: Sequence[str]) -> tuple[set[str], set[str]]:
    """The layers that a text of four tokens calls, and those for which a loss would have a gradient.

    Layers that only select (the keys of a sparse attention) have none. If the base cannot be called with the text, both
    are all layers.
    """
    modules = dict(base.named_modules())
    outputs: dict[str, list[Any]] = {}
    try:
        with contextlib.ExitStack() as hooks, without_dropout(base), as_in_training(base):
            for name in names:
                hooks.enter_context(modules[name].register_forward_hook(partial(_note, outputs, name)))
            ids = torch.arange(3, 7, device=base.get_input_embeddings().weight.device)[None]
            logits = base(input_ids=ids, use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError):
        return set(names), set(names)
    loss_graph = _graph(logits.grad_fn)
    learned = {name for name, of_layer in outputs.items() if any(node in loss_graph for node in of_layer)}
    return set(outputs), learned


def _note(outputs: dict[str, list[Any]], name: str, _layer: nn.Module, _inputs: Any, output: Any) -> None:
    """Record the autograd node of a layer's output; of several outputs (a router's), that of the first."""
    first = output[0] if isinstance(output, tuple) else output
    outputs.setdefault(name, []).append(first.grad_fn)


def _graph(last: Any) -> set[Any]:
    """Every autograd node between a result and its leaves."""
    steps: set[Any] = set()
    open_steps = [last]
    while open_steps:
        step = open_steps.pop()
        if step is not None and step not in steps:
            steps.add(step)
            open_steps += [before for before, _ in step.next_functions]
    return steps


def _tower(name: str, called: Collection[str]) -> str:
    """For a layer that is not called: the last part of the outermost module around it in which nothing is called."""
    outermost = name
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        around = ".".join(parts[:depth])
        if any(other.startswith(f"{around}.") for other in called):
            break
        outermost = around
    # For an item of a list, the list's name too: adapter_list.0
    return re.findall(r"[^.]+(?:\.\d+)*$", outermost)[-1]


class _StandIn(nn.Module):
    """A model of an architecture with one linear layer of a given name."""

    def __init__(self, model_type: str, name: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        self.add_module(name, nn.Linear(2, 2))


@cache
def _peft_adapts(model_type: str, name: str, *, as_tensor: bool = False) -> bool:
    """Whether PEFT adapts a layer of this name in this architecture.

    as_tensor  ask about adapting its weight as a tensor, through target_parameters

    PEFT refuses some layers of Mamba, because fast kernels read them without calling them. In architectures whose
    experts used to be linear layers, it takes `gate_proj` and similar names for the experts' fused matrices, even if
    they are the names of dense layers.
    """
    config = LoraConfig(target_modules=[] if as_tensor else [name], r=1)
    config.target_parameters = [f"{name}.weight"] if as_tensor else None
    try:
        # The stand-in must not draw from the run's random numbers, or the run's adapter would start with other values.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            adapted = get_peft_model(_StandIn(model_type, name), config)
    except (ValueError, KeyError):
        return False
    return any("lora_A" in weight for weight, _ in adapted.named_parameters())


def match_targets(base: CausalLM, targets: Sequence[str]) -> dict[str, int]:
    """How many modules each target name matches; for all-linear, every kind of linear layer and its count.

    Raises BadSettings if a target matches nothing, naming the layers that exist, or matches something that LoRA cannot
    adapt here: an embedding, a whole block, or an output layer tied to the embedding. Raises BadModel if all-linear
    matches nothing.
    """
    counts: dict[str, int] = {}
    if ALL_LINEAR in targets:
        adapted = Counter(_kind(name) for name in all_linear(base).adapted)
        if not adapted:
            raise BadModel("The base has no linear layer that LoRA could adapt.")
        counts |= sorted(adapted.items())
    targets = [target for target in targets if target != ALL_LINEAR]
    kinds = Counter(_last_part(name) for name in linear_names(base))
    counts |= {target: len(matched(base, [target])) for target in targets}
    problems = []
    if missing := [target for target, count in counts.items() if not count and not _named(base, [target])]:
        problems.append(f"--lora_targets: no module is called {', '.join(missing)}.")
    for target in targets:
        problems += _unfit(base, target)
    if problems:
        linear = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
        raise BadSettings([*problems, f"Linear layers of this model: {linear}."])
    return counts


def _unfit(base: CausalLM, target: str) -> list[str]:
    """Problems with the modules that a target matches; at most one, since it is the same for all of them."""
    names = matched(base, [target])
    if not names and (routers := _named(base, [target])):
        return [
            f"--lora_targets {target}: {min(routers)} is a router or an expert gate; routers and gates of shared "
            "experts stay frozen here."
        ]
    head = base.get_output_embeddings()
    tied = head is not None and head.weight is getattr(base.get_input_embeddings(), "weight", None)
    for name, module in base.named_modules():
        if name not in names:
            continue
        if not isinstance(module, nn.Linear | Conv1D):
            kind = type(module).__name__
            return [f"--lora_targets {target}: {name} is of the type {kind}; LoRA adapts only linear layers here."]
        if tied and module is head:
            return [
                f"--lora_targets {target}: in this model the output layer and the embedding are one matrix, so an "
                "adapter of one of them could not be merged."
            ]
    return []


def matched(base: CausalLM, targets: Collection[str]) -> set[str]:
    """Full names of the modules that targets match: `q_proj` matches each text module whose name ends with it.

    Routers are left out: their layers may have the same names (Zaya's has a down_proj).
    """
    modules = dict(base.named_modules())
    return {name for name in _named(base, targets) if not _chooses_experts(base, name, modules)}


def _named(base: CausalLM, targets: Collection[str]) -> set[str]:
    """The same, including routers."""
    return _ending_with(targets, text_modules(base))


def _ending_with(targets: Collection[str], names: Iterable[str]) -> set[str]:
    """The names whose last parts are a target: `layers.0.q_proj` for `q_proj`."""
    endings = tuple(f".{target}" for target in targets)
    return {name for name in names if f".{name}".endswith(endings)}


def _chooses_experts(base: CausalLM, name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether this is a linear layer of a router, or the gate of a shared expert."""
    layer = modules[name]
    if not isinstance(layer, nn.Linear | Conv1D):
        return False
    return _router_of(base, name, modules) is not None or _is_gate_of_one(_last_part(name), layer)


def adapted_by(base: CausalLM, targets: Collection[str]) -> set[str]:
    """Full names of the layers that targets mean, including all-linear."""
    names = matched(base, targets)
    return names.union(all_linear(base).adapted) if ALL_LINEAR in targets else names


def for_text(base: CausalLM, targets: Sequence[str]) -> Sequence[str]:
    """Targets as they are, or as full names if layers of an image or audio tower have these names too."""
    names = matched(base, targets)
    everywhere = _ending_with(targets, (name for name, _ in base.named_modules()))
    return targets if everywhere == names else sorted(names)


def refuse_endless_patterns(config: Any, base: CausalLM, file: Path) -> None:
    """Raise BadModel if a regex in an adapter's config is invalid, or takes forever on this base's module names.

    PEFT matches it with the name of every module; `(a|aa)+$` takes exponential time.
    """
    patterns = [getattr(config, name, None) for name in ("target_modules", "exclude_modules")]
    layers = getattr(config, "layers_pattern", None)
    patterns += layers if isinstance(layers, list) else [layers]
    patterns += [*(getattr(config, "rank_pattern", None) or ()), *(getattr(config, "alpha_pattern", None) or ())]
    regexes = [text for text in patterns if isinstance(text, str) and text != ALL_LINEAR and not _PLAIN.fullmatch(text)]
    names = [name for name, _ in base.named_modules()]
    for text in regexes:
        try:
            regex = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise BadModel(f"{file}: {text[:60]!r} is not a regex: {error}.") from None
        if tripped := try_in_child_process(partial(_search_all, regex, names)):
            raise BadModel(
                f"{file}: the regex {text[:60]!r} {tripped.words} when matched with the names of this base's modules.\n"
                'Name the modules instead: ["q_proj", "v_proj"].'
            )


def _search_all(regex: re.Pattern[str], names: Sequence[str], _say: Callable[[str], None]) -> None:
    for name in names:
        regex.search(name)


def shortest(base: CausalLM, modules: set[str]) -> list[str]:
    """The last parts of module names if they match only the given modules, else their full names."""
    parts = sorted({_last_part(name) for name in modules})
    if {name for name, _ in base.named_modules() if _last_part(name) in parts} == modules:
        return parts
    return sorted(modules)


def _kind(name: str) -> str:
    """`layers.0.mlp.up_proj` → `up_proj`; for an item of a list, the list's name: `altup_projections.1`"""
    return _last_part(re.sub(r"(\.\d+)+$", "", name))


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
