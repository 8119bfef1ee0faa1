"""Merged weights: correct merges of small and large adapters pass in all dtypes; planted faults of any size do not."""

from pathlib import Path

import pytest
import torch

from atomtune.export import merged_weights
from atomtune.model.adapter import load_trained
from atomtune.model.load import BaseSpec, load_base
from tests.adapters import CPU, OTHER_KINDS, adapter_on, by_peft


def merged_by(spoil, base: Path, adapter: Path, dtype: torch.dtype):
    """Base + adapter, and the plain model merged from a spoiled copy of the adapter."""
    spec = BaseSpec(path=str(base), dtype=dtype, device=CPU)
    spoiled = load_trained(load_base(spec), adapter)
    with torch.no_grad():
        spoil(merged_weights._lora_layers(spoiled))
    return load_trained(load_base(spec), adapter), merged_weights.merge_weights(spoiled)


def scaled(by: float):
    def spoil(layers):
        for layer in layers.values():
            layer.scaling["default"] *= by

    return spoil


def one_dropped(layers):
    next(iter(layers.values())).scaling["default"] = 0.0


def one_number_of_the_base(layers):
    next(iter(layers.values())).get_base_layer().weight[3, 5] *= 1.05


def nothing(layers):
    pass


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_fault_in_parameters_beyond_the_lora_matrices_is_detected(models, tmp_path, kind):
    family, wanted = OTHER_KINDS[kind]
    spec = BaseSpec(path=str(models(family)), dtype=torch.float32, device=CPU)
    adapter = by_peft(models(family), tmp_path, wanted)
    adapted = load_trained(load_base(spec), adapter)
    for part in ("lora_magnitude", "lora_embedding_B", "lora_B.default.bias", "modules_to_save", "trainable_tokens"):
        for name, _ in adapted.named_parameters():
            if part in name:
                spoiled = load_trained(load_base(spec), adapter)
                with torch.no_grad():
                    spoiled.get_parameter(name).view(-1)[-1] *= 1.01
                assert merged_weights.compare_weights(adapted, merged_weights.merge_weights(spoiled)).problems, name


every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@every_dtype
@pytest.mark.parametrize("size", [0.0003, 0.01, 0.3])
def test_a_correct_merge_passes(models, tmp_path, dtype, size):
    weights = merged_weights.compare_weights(
        *merged_by(nothing, models("llama"), adapter_on(models("llama"), tmp_path, size=size), dtype)
    )
    assert not weights.problems
    assert weights.adapted == 14
    # bfloat16 resolves 0.4 %, so most of a change of 0.03 % is lost. That is correct, and the user gets a notice.
    assert (weights.share_kept < 0.5) == (dtype is torch.bfloat16 and size == 0.0003)


@every_dtype
@pytest.mark.parametrize(
    "spoil", [scaled(1.01), scaled(0.5), one_dropped, one_number_of_the_base], ids=["1%", "half", "dropped", "number"]
)
def test_a_fault_of_any_size_is_detected(models, tmp_path, dtype, spoil):
    adapter = adapter_on(models("llama"), tmp_path, size=0.01)
    assert merged_weights.compare_weights(*merged_by(spoil, models("llama"), adapter, dtype)).problems


def test_float16_subnormals_are_checked_by_their_even_spacing():
    # Below 6e-5 they are evenly spaced. Regression: a correct merge of 2,048 numbers was refused because of one.
    exact = torch.linspace(-1e-4, 1e-4, 1001, dtype=torch.float64)
    assert not merged_weights._not_nearest(exact.half(), exact, [torch.zeros_like(exact)])
    moved = exact.half() + 2**-23  # two representable numbers away
    assert merged_weights._not_nearest(moved, exact, [torch.zeros_like(exact)])


def test_a_changed_base_tensor_is_detected(models, tmp_path):
    adapted, written = merged_by(
        nothing, models("llama"), adapter_on(models("llama"), tmp_path, size=0.01), torch.float32
    )
    with torch.no_grad():
        written.model.norm.weight[0] += 1e-3
    assert merged_weights.compare_weights(adapted, written).problems == (
        "model.norm.weight: its numbers are not the base's",
    )


def test_a_number_that_is_none_a_matrix_of_another_shape_and_a_missing_tensor_are_detected(models, tmp_path):
    adapted, written = merged_by(
        nothing, models("llama"), adapter_on(models("llama"), tmp_path, size=0.01), torch.float32
    )
    first, second = written.model.layers
    with torch.no_grad():
        first.mlp.up_proj.weight[0, 0] = torch.nan
    first.self_attn.q_proj = torch.nn.Linear(2, 2, bias=False)
    del second.input_layernorm.weight
    assert merged_weights.compare_weights(adapted, written).problems == (
        "model.layers.0.mlp.up_proj.weight: 1 of 2,048 numbers are not base + adapter",
        "model.layers.0.self_attn.q_proj.weight: missing from the written files, or of another shape",
        "model.layers.1.input_layernorm.weight: not in the written files",
    )
