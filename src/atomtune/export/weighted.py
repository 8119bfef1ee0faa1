"""Weighted adapters: one or several adapters on one base, each with a factor: W + 0.7 B₁A₁ + 0.3 B₂A₂."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from atomtune.choices import ADAPTER_CONFIG
from atomtune.errors import BadModel, BadSettings
from atomtune.model.adapter import load_another, load_trained
from atomtune.model.adapter_folder import adapter_config, repeated
from atomtune.model.causal_lm import CausalLM


@dataclass(frozen=True)
class Weighted:
    """An adapter's folder and its factor."""

    folder: Path
    weight: float

    def __str__(self) -> str:
        return f"{self.weight:g} × {self.folder}"


def weighted(folders: Sequence[str], weights: Sequence[float]) -> tuple[Weighted, ...]:
    """Folders with their weights; a single folder without one gets 1. Raises BadSettings if their numbers differ."""
    if not weights and len(folders) == 1:
        weights = [1.0]
    if len(weights) != len(folders):
        there = f"{len(weights)} numbers" if weights else "missing"
        raise BadSettings(
            [
                f"--weights: {there} for {len(folders)} adapters. Pass one per adapter: 0.5 0.5 is the mean of two, 1 "
                "1 their sum."
            ]
        )
    if repeated(map(Path, folders)):
        raise BadSettings(["--adapter_path names a folder twice. Pass it once, with a larger weight."])
    return tuple(Weighted(Path(folder), weight) for folder, weight in zip(folders, weights, strict=True))


def load_weighted(base: CausalLM, adapters: Sequence[Weighted]) -> PeftModel:
    """The base with all adapters active, each scaled by its weight. Raises BadModel for one that does not fit."""
    is_plain = len(adapters) == 1 and adapters[0].weight == 1
    if not is_plain:
        for adapter in adapters:
            _refuse_unweighable(adapter.folder)
    first, *others = adapters
    model = load_trained(base, first.folder)
    weights = {model.active_adapters[0]: first.weight}
    for number, other in enumerate(others, 2):
        name = f"adapter_{number}"
        load_another(model, other.folder, name)
        weights[name] = other.weight
    if not is_plain:
        model.base_model.set_adapter(list(weights))
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                for name, weight in weights.items():
                    layer.set_scale(name, weight)
    return model.eval()


def _refuse_unweighable(folder: Path) -> None:
    """Raise BadModel for an adapter that does more than add matrices."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return  # loading it names what is missing
    config = adapter_config(folder)
    reasons = {
        "use_dora": "DoRA, which also scales the base's weights",
        "modules_to_save": "layers that were trained in full",
        "target_parameters": "adapters of experts",
        "trainable_token_indices": "rows of single tokens that were trained whole",
    }
    problems = [text for name, text in reasons.items() if getattr(config, name, None)]
    if getattr(config, "bias", "none") != "none":
        problems.append("trained biases")
    if problems:
        raise BadModel(f"{folder} holds {' and '.join(problems)}, and cannot be added with a weight. Merge it alone.")
