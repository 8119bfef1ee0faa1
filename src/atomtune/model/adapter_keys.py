"""Adapter keys: the names of an adapter's tensors, rewritten for the class that is to load them.

The same layer has other names in the text class of a checkpoint and in the whole one (vision and language together):
`model.layers.0…` here, `model.language_model.layers.0…` there. PEFT loads an adapter whose names match nothing without
an error, and the model answers as its base. Names are matched by asking the class itself, on the meta device: no weight
is loaded.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from atomtune.errors import BadModel, BadSettings, listing

_PREFIX = "base_model.model."
#: PEFT's own part of a name, around a layer that it wraps twice.
_WRAPPED = ".base_layer"
#: And behind one of which it trains single tokens' rows.
_ROWS = ".token_adapter"


def module_of(name: str) -> str:
    """The module that a tensor of an adapter belongs to, as the model names it."""
    layer, is_lora, _ = name.removeprefix(_PREFIX).partition(".lora_")
    if not is_lora:  # a layer that PEFT saves whole beside its adapter, as `lm_head.weight`
        layer = layer.rpartition(".")[0].removesuffix(_ROWS)
    return layer.replace(_WRAPPED, "")


def with_new_names(patterns: Mapping[str, Any], modules: Mapping[str, str]) -> dict[str, Any]:
    """A config's ranks or alphas by layer: full names get the new ones; ends of names mean the same in both classes.

    modules  old full name → new
    """
    return {modules.get(name, name): value for name, value in patterns.items()}


def text_modules(model: Any) -> list[str]:
    """Full names of the modules that read text: not those of a vision or sound tower."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    whole = {module: name for name, module in model.named_modules()}
    inside = whole.get(decoder, "")
    if not inside:
        return [name for name in whole.values() if name]
    head = whole.get(model.get_output_embeddings())
    names = [name for name in whole.values() if name == inside or name.startswith(f"{inside}.")]
    return [*names, head] if head else names


def modules_of_class(class_name: str, base_path: str, *, trust_remote_code: bool) -> list[str]:
    """Full names of this class's modules for text, with the base's config and without its weights."""
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
    """Of each tensor its name in the other class: the module whose name ends as the old one's does, from a layer on.

    Raises BadModel with the layers that have no place there, or more than one.
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
    """Of each tensor its name in this model: its own where the model has that layer, else that of the same layer.

    An adapter of a text class (Qwen3.5's, as other tools train it) is read so on the whole class, and the other way
    round. Where a layer has no one place, all names stay as they are, and what does not fit is said by who fills it.
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
    """Raise BadModel where the class that the base's config names has no layer for a tensor of an adapter.

    Other programs build that class, and PEFT passes over such tensors with a warning. A class that transformers does
    not have (code that comes with the model) cannot be asked.
    """
    config = AutoConfig.from_pretrained(base_path, trust_remote_code=trust_remote_code)
    kind: Any = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if not isinstance(config, getattr(kind, "config_class", None) or ()):
        return
    with torch.device("meta"):
        modules = {name for name, _ in kind(config).named_modules()}
    unread = sorted({module for name in weights if (module := module_of(name)) not in modules})
    if unread:
        raise BadModel(
            f"{base_path} names the class {kind.__name__}, which has no place for these layers of the adapter. "
            f"Other programs would leave them out:\n{listing(unread)}"
        )
