"""PEFT keys: the names of an adapter's tensors, rewritten for the class that is to load them.

The same layer has other names in the text class of a checkpoint and in the whole one (vision and language together):
`model.layers.0…` here, `model.language_model.layers.0…` there. PEFT loads an adapter whose names match nothing without
an error, and the model answers as its base. Names are matched by asking the class itself, on the meta device: no weight
is loaded.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from atomtune.errors import BadModel, BadSettings, listing
from atomtune.model.adapter_folder import CONFIG, WEIGHTS

_PREFIX = "base_model.model."


def rewrite_keys(adapter: Path, out: Path, class_name: str, base_path: str, *, trust_remote_code: bool) -> int:
    """Write the adapter with the names that class_name has; how many tensors got another name.

    Raises BadSettings for a class that transformers does not have, BadModel where a layer has no one place in it.
    """
    modules = modules_of(class_name, base_path, trust_remote_code=trust_remote_code)
    weights = load_file(adapter / WEIGHTS)
    renamed = new_names(weights, modules)
    shutil.copytree(adapter, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*", "evaluation", ".*"))
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    save_file({renamed[name]: tensor for name, tensor in weights.items()}, out / WEIGHTS, metadata=metadata)
    _rewrite_targets(out / CONFIG, {old: renamed[old] for old in weights})
    return sum(old != new for old, new in renamed.items())


def modules_of(class_name: str, base_path: str, *, trust_remote_code: bool) -> list[str]:
    """Full names of the modules of this class with the base's config, without its weights."""
    kind: Any = getattr(transformers, class_name, None)
    if not hasattr(kind, "config_class"):
        raise BadSettings([f"--for_class {class_name}: transformers {transformers.__version__} has no such class."])
    config = AutoConfig.from_pretrained(base_path, trust_remote_code=trust_remote_code)
    if not isinstance(config, kind.config_class):
        config = config.get_text_config()
    if not isinstance(config, kind.config_class):
        raise BadSettings([f"--for_class {class_name}: it is no class for {base_path} ({config.model_type})."])
    with torch.device("meta"):
        model = kind(config)
    return [name for name, _ in model.named_modules() if name]


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
        module, lora, rest = name.removeprefix(_PREFIX).partition(".lora_")
        places = by_ending.get(_from_layer(module), [])
        # The towers of vision, sound and text may each have a layers.0; the adapter is one for text.
        texts = [place for place in places if "vision" not in place and "audio" not in place]
        if len(texts) == 1:
            renamed[name] = f"{_PREFIX}{texts[0]}{lora}{rest}"
        else:
            problems.append(f"{module}: {len(texts)} places in the class ({', '.join(places[:3]) or 'none'})")
    if problems:
        raise BadModel(f"Not every layer of the adapter has one place in that class:\n{listing(sorted(set(problems)))}")
    return renamed


def _from_layer(module: str) -> str:
    """`model.language_model.layers.0.mlp.up_proj` → `layers.0.mlp.up_proj`."""
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return module if number is None else ".".join(parts[max(number - 1, 0) :])


def _rewrite_targets(file: Path, renamed: dict[str, str]) -> None:
    """Targets that are full names get the new ones; last parts of names, as q_proj, mean the same in both classes."""
    values = json.loads(file.read_text(encoding="utf-8"))
    modules = {_module_of(old): _module_of(new) for old, new in renamed.items()}
    if isinstance(values.get("target_modules"), list):
        values["target_modules"] = sorted(modules.get(target, target) for target in values["target_modules"])
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _module_of(name: str) -> str:
    return name.removeprefix(_PREFIX).partition(".lora_")[0]
