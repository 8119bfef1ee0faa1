"""Merged weights: an adapter's matrices added to its base's, and the check that every number of the sum is right.

The check computes base + adapter itself, in float64, independently of PEFT's merging.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.lora.layer import Embedding
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from atomtune.errors import CheckFailed, listing
from atomtune.export.output_folder import NOT_KEPT
from atomtune.model.causal_lm import CausalLM

#: PEFT puts this into the names of the layers that it wraps.
_WRAPPED = ".base_layer"
#: Name parts of the adapter's own tensors.
_OF_ADAPTERS = (".lora_", ".modules_to_save.", ".original_module.", ".token_adapter.")


@dataclass(frozen=True)
class Weights:
    """How the written weights compare with base + adapter."""

    adapted: int  # matrices that the adapter adds to
    same: int  # other tensors, equal bit by bit
    whole: int  # those of `same` that the adapter stores in full; the others are the base's
    share_kept: float  # share of the adapter's change that rounding to the dtype kept; 1 is all
    problems: tuple[str, ...]


@torch.no_grad()
def merge_weights(model: PeftModel) -> CausalLM:
    """The plain model with W + BA in its matrices, summed in float32 and rounded once.

    PEFT alone rounds twice: BA to the base's dtype, then the sum.
    """
    for layer in _lora_layers(model).values():
        weight = _adapted_weight(layer)
        dtype = weight.dtype
        weight.data = weight.data.to(torch.promote_types(dtype, torch.float32))
        layer.merge()
        weight = _adapted_weight(layer)
        weight.data = weight.data.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        warnings.filterwarnings("ignore", message="Already following adapters")  # not all adapters have all layers
        return model.merge_and_unload()  # removes PEFT's layers


def _lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Name of the adapted weight in the plain model → PEFT's layer."""
    layers = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            # If two tensors of one module are adapted (an expert's up and down), PEFT nests their wrappers.
            plain = name.replace(_WRAPPED, "")
            layers[f"{plain}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return layers


def _adapted_weight(layer: LoraLayer) -> nn.Parameter:
    if isinstance(layer, ParamWrapper):
        return layer.get_param()
    return layer.get_base_layer().weight


@torch.no_grad()
def compare_weights(adapted: PeftModel, written: CausalLM) -> Weights:
    """Compare every tensor of a written model with base + adapter.

    Each number must be the one in its dtype that is nearest to the exact sum. This finds faults of any size: a wrong
    base, a missing layer, an adapter scaled by 1.01.
    """
    unchecked = dict(written.named_parameters())
    layers = _lora_layers(adapted)
    problems: list[str] = []
    # share_kept: the written change M - W, projected on the adapter's change D: <M - W, D> / <D, D>.
    change_wanted, change_written = 0.0, 0.0
    for name, base, deltas in _sums(layers):
        delta = torch.stack(deltas).sum(0)
        merged = unchecked.pop(name, None)
        if merged is None or merged.shape != base.shape:
            problems.append(f"{name}: missing from the written files, or of another shape")
            continue
        problems += [f"{name}: {fault}" for fault in _not_nearest(merged, base, deltas)]
        change_written += ((merged.double() - base) * delta).sum().item()
        change_wanted += delta.square().sum().item()

    # All sums are checked. Every other tensor must be the base's, or the adapter's if it stores the tensor in full.
    whole = _whole_weights(adapted)
    unadapted = {**_base_weights(adapted), **whole}
    for name, weight in unchecked.items():
        if name not in unadapted or not torch.equal(unadapted[name].to(weight.dtype), weight):
            if name in whole:
                problems.append(f"{name}: its numbers are not the adapter's")
            else:
                problems.append(f"{name}: its numbers are not the base's")
    names = {name for name, _ in written.named_parameters(remove_duplicate=False)}
    for name in unadapted.keys() - names:
        problems.append(f"{name}: not in the written files")
    share_kept = change_written / change_wanted if change_wanted else 1.0
    return Weights(
        len(layers), len(unchecked), len(whole.keys() & unchecked.keys()), share_kept, tuple(sorted(problems))
    )


def _base_weights(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """The base's weights, adapted or not, by their names in the plain model; tied weights by each of their names."""
    weights = {}
    for name, weight in adapted.get_base_model().named_parameters(remove_duplicate=False):
        # PEFT's names: q_proj.base_layer.weight for an adapted matrix, q_proj.base_layer.bias for its bias.
        if not any(part in name for part in _OF_ADAPTERS):
            weights[name.replace(_WRAPPED, "")] = weight
    return weights


def _whole_weights(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """Weights that an adapter stores in full, in place of the base's: whole layers, and embeddings of single tokens."""
    weights: dict[str, torch.Tensor] = {}
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            (active,) = module.active_adapters
            for part, weight in module.modules_to_save[active].named_parameters():
                weights[f"{name}.{part}"] = weight
        elif isinstance(module, TrainableTokensWrapper):
            weights[f"{name}.weight"] = module.weight
    return weights


def _sums(layers: Mapping[str, LoraLayer]) -> Iterator[tuple[str, torch.Tensor, list[torch.Tensor]]]:
    """For each tensor that adapters add to: its name, the base's value and each active adapter's part, in float64."""
    for name, layer in layers.items():
        names = [adapter for adapter in layer.active_adapters if adapter in layer.scaling]
        yield name, _adapted_weight(layer).double(), [_delta(layer, adapter) for adapter in names]
        if with_bias := [adapter for adapter in names if layer.lora_bias[adapter]]:
            added = [layer.scaling[adapter] * layer.lora_B[adapter].bias.double() for adapter in with_bias]
            yield f"{name.removesuffix('weight')}bias", layer.get_base_layer().bias.double(), added


def _delta(layer: LoraLayer, name: str) -> torch.Tensor:
    """What an adapter adds to a matrix, in float64, computed without PEFT's merging."""
    if name in layer.lora_magnitude_vector:
        return _delta_of_dora(layer, name)
    if layer.lora_variant.get(name) is not None:  # other variants have their own formulas
        return layer.get_delta_weight(name).double()
    return _product(layer, name)


def _delta_of_dora(layer: LoraLayer, name: str) -> torch.Tensor:
    """DoRA (Liu et al. 2024, arXiv 2402.09353): m (W + BA) / |W + BA| - W; m has one number for each output."""
    base = _adapted_weight(layer).double()
    direction = base + _product(layer, name)
    inputs = 0 if isinstance(layer, Embedding) or layer.fan_in_fan_out else 1
    norm = direction.norm(dim=inputs, keepdim=True)
    return layer.lora_magnitude_vector[name].weight.double().reshape(norm.shape) * direction / norm - base


def _product(layer: LoraLayer, name: str) -> torch.Tensor:
    """alpha / r * B A, in the shape of the matrix that it is added to.

    E experts, r the rank, I inputs, O outputs
    """
    if isinstance(layer, Embedding):  # [I, O], I the vocabulary
        return layer.scaling[name] * (layer.lora_embedding_B[name].double() @ layer.lora_embedding_A[name].double()).T
    down, up = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
    if isinstance(layer, ParamWrapper) and layer.get_param().dim() == 3:
        experts = layer.get_param().shape[0]
        down = down.unflatten(0, (experts, -1))  # [E * r, I] → [E, r, I]
        up = up.unflatten(1, (-1, experts)).permute(2, 0, 1)  # [O, r * E] → [E, O, r]
        delta = layer.scaling[name] * (up @ down)  # [E, O, I]
        # Some models store their experts as [E, I, O] and set is_transposed.
        return delta.mT if getattr(layer.get_base_layer(), "is_transposed", False) else delta
    delta = layer.scaling[name] * (up @ down)
    return delta.T if layer.fan_in_fan_out else delta


def _not_nearest(merged: torch.Tensor, base: torch.Tensor, deltas: Sequence[torch.Tensor]) -> list[str]:
    """A problem if numbers of a merged matrix are not the nearest in its dtype to base + all deltas."""
    exact = base + torch.stack(list(deltas)).sum(0)
    largest = sum(float(delta.abs().max()) for delta in deltas)
    # Allowed: half a unit in the last place for the rounding, and the error of the float32 sums before it.
    dtype = torch.finfo(merged.dtype)
    rounding = dtype.eps / 2 * exact.abs().clamp(min=dtype.smallest_normal)  # below that, numbers are evenly spaced
    sums = 8 * torch.finfo(torch.float32).eps * (base.abs() + largest)
    off_by = (merged.double() - exact).abs()
    wrong = int((~(off_by <= rounding + sums)).sum())  # written so that NaN is wrong too
    if not wrong:
        return []
    return [f"{wrong:,} of {merged.numel():,} numbers are not base + adapter"]


def refuse_other_weights(weights: Weights) -> None:
    """Raise CheckFailed if the comparison found a problem."""
    if weights.problems:
        raise CheckFailed(f"The merged weights are not base + adapter:\n{listing(weights.problems)}\n{NOT_KEPT}")
