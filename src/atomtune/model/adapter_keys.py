"""Adapter keys: renames an adapter's tensors for the class that is to load them.

A layer has different names in the text-only class of a checkpoint and in the whole vision-language class:

    text only   model.layers.0…
    whole       model.language_model.layers.0…

If no name matches, PEFT loads the adapter without an error, and the model answers like its base. The names are read
from the class itself, built on the meta device, so no weights are loaded.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from atomtune.errors import BadModel, BadSettings, listing

_PREFIX = "base_model.model."
#: The part that PEFT inserts into the name of a layer that it wraps twice.
_WRAPPED = ".base_layer"
#: The part that PEFT inserts when it trains the embedding rows of single tokens.
_ROWS = ".token_adapter"


def module_of(name: str) -> str:
    """The name that the model gives to the module of an adapter tensor."""
    layer, is_lora, _ = name.removeprefix(_PREFIX).partition(".lora_")
    if not is_lora:  # a layer that PEFT saves whole, for example `lm_head.weight`
        layer = layer.rpartition(".")[0].removesuffix(_ROWS)
    return layer.replace(_WRAPPED, "")


def with_new_names(patterns: Mapping[str, Any], modules: Mapping[str, str]) -> dict[str, Any]:
    """Rename the layers in rank_pattern or alpha_pattern. Only full names change; endings match in both classes.

    modules  old full name → new
    """
    return {modules.get(name, name): value for name, value in patterns.items()}


def text_modules(model: Any) -> list[str]:
    """Full names of the modules that process text, without those of a vision or audio tower."""
    whole = {module: name for name, module in model.named_modules()}
    inside = whole.get(model.get_decoder(), "")
    if not inside:
        return [name for name in whole.values() if name]
    head = whole.get(model.get_output_embeddings())
    names = [name for name in whole.values() if name == inside or name.startswith(f"{inside}.")]
    return [*names, head] if head else names


def modules_of_class(class_name: str, base_path: str, *, trust_remote_code: bool) -> list[str]:
    """Full names of a class's text modules, from the base's config alone. Raises BadSettings if the class is unfit."""
    kind: Any = getattr(transformers, class_name, None)
    if not hasattr(kind, "config_class"):
        raise BadSettings([f"--for_class {class_name}: transformers {transformers.__version__} has no such class."])
    config = AutoConfig.from_pretrained(base_path, trust_remote_code=trust_remote_code)
    if not isinstance(config, kind.config_class):
        config = config.get_text_config()
    if not isinstance(config, kind.config_class):
        raise BadSettings([f"--for_class {class_name}: it is not a class for {base_path} ({config.model_type})."])
    with torch.device("meta"):
        model = kind(config)
    return text_modules(model)


def new_names(weights: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """Each tensor's name → its name in the other class, which has the same path from the layer number on.

    Raises BadModel naming the layers that have no match there, or more than one.
    """
    renamed: dict[str, str] = {}
    problems: list[str] = []
    by_ending: dict[str, list[str]] = {}
    for module in modules:
        by_ending.setdefault(_from_layer(module), []).append(module)
    for name in weights:
        module = module_of(name)
        places = by_ending.get(_from_layer(module), [])
        if len(places) == 1:
            rest = name.removeprefix(_PREFIX).removeprefix(module)
            renamed[name] = f"{_PREFIX}{places[0]}{rest}"
        else:
            problems.append(f"{module}: {len(places)} places in the class ({', '.join(places[:3]) or 'none'})")
    if problems:
        raise BadModel(f"Not every layer of the adapter has one place in that class:\n{listing(sorted(set(problems)))}")
    return renamed


def _from_layer(module: str) -> str:
    """`model.language_model.layers.0.mlp.up_proj` → `layers.0.mlp.up_proj`."""
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return module if number is None else ".".join(parts[max(number - 1, 0) :])


def names_in(model: Any, weights: Iterable[str]) -> dict[str, str]:
    """Each tensor's name → its name in this model: unchanged if the model has all these layers, else by `new_names`.

    So an adapter of a text-only class (other tools train Qwen3.5's) fits the whole class, and vice versa. If a layer
    has no unique match, all names stay as they are; whoever loads the tensors reports what does not fit.
    """
    weights = list(weights)
    modules = {name for name, _ in model.named_modules()}
    if all(module_of(name) in modules for name in weights):
        return {name: name for name in weights}
    try:
        return new_names(weights, text_modules(model))
    except BadModel:
        return {name: name for name in weights}


def refuse_unread(weights: Iterable[str], base_path: str, *, trust_remote_code: bool) -> None:
    """Raise BadModel if the class named in the base's config has no layer for some of an adapter's tensors.

    Other programs build that class, and PEFT skips such tensors with only a warning. Classes that transformers does not
    have (code that comes with the model) are not checked.
    """
    config = AutoConfig.from_pretrained(base_path, trust_remote_code=trust_remote_code)
    kind: Any = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if not isinstance(config, getattr(kind, "config_class", None) or ()):
        return
    with torch.device("meta"):
        modules = {name for name, _ in kind(config).named_modules()}
    unread = sorted({module_of(name) for name in weights} - modules)
    if unread:
        raise BadModel(
            f"{base_path} names the class {kind.__name__}, which has no place for these layers of the adapter. "
            f"Other programs would leave them out:\n{listing(unread)}"
        )
