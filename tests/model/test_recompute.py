"""Recompute: some layers compute their activations twice; gradients equal those of a model that keeps them all."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from atomtune.model.adapter import LoraSpec, new_adapter
from atomtune.model.memory import FILLED_BY_CHOICE, layers_to_recompute
from atomtune.model.recompute import recomputable_layers, recompute_first
from tests.hybrids import HYBRIDS, WALKED

IDS = torch.arange(3, 35)[None]
LAYERS = 4


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS,
                         num_attention_heads=4)  # fmt: skip
    model = new_adapter(
        AutoModelForCausalLM.from_config(config, dtype=torch.float64),
        LoraSpec(rank=4, alpha=8, dropout=0.0, targets=["all-linear"]),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.train()


def step(model: Any) -> tuple[Counter[int], int, dict[str, torch.Tensor]]:
    """(how often each layer was computed, bytes kept for the backward pass, the gradients)."""
    times: Counter[int] = Counter()
    for number, layer in enumerate(recomputable_layers(model)):
        inner = next(layer.children())
        inner.register_forward_hook(lambda *_, number=number: times.update([number]))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    size = sum(kept.values())
    loss.backward()
    return times, size, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def recomputing(model: Any, share: float) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    recompute_first(model, share)
    return model


@pytest.mark.parametrize(("share", "first"), [(1.0, 4), (0.75, 3), (0.5, 2), (0.3, 2), (0.25, 1)])
def test_recomputing_the_first_layers_leaves_the_gradients_unchanged(share, first):
    once, most, expected = step(llama())
    assert once == dict.fromkeys(range(LAYERS), 1)
    times, kept, gradients = step(recomputing(llama(), share))
    assert times == {number: 2 if number < first else 1 for number in range(LAYERS)}
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    # Each recomputed layer keeps only its input, so less is kept the more layers are recomputed.
    _, least, _ = step(recomputing(llama(), 1.0))
    assert kept == pytest.approx(most - (most - least) * first / LAYERS, rel=0.05)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "mamba2", "zamba2"])
def test_recomputable_layers_are_found_in_every_hybrid_family(family):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**HYBRIDS, **WALKED}[family]))
    layers = recomputable_layers(model)
    assert len(layers) == model.config.num_hidden_layers
    recomputing(model, 0.5)
    on = [layer.gradient_checkpointing for layer in layers]
    assert on == sorted(on, reverse=True)
    assert sum(on) == -(-len(layers) // 2)
    inside = [module for module in layers[-1].modules() if getattr(module, "gradient_checkpointing", False)]
    assert not inside, "a layer within a kept one would be recomputed still"


def test_exactly_the_chosen_number_of_trained_layers_is_recomputed():
    # 1 - 9/10 is less than 1/10 in floating point, and the layers of a frozen tower keep nothing.
    for number_of_layers in range(1, 50):
        for number in range(1, number_of_layers + 1):
            model, tower = layers_of(number_of_layers), layers_of(3).requires_grad_(requires_grad=False)
            recompute_first(nn.ModuleList([tower, model]), number / number_of_layers)
            assert sum(layer.gradient_checkpointing for layer in model) == number


def layers_of(number: int) -> nn.Sequential:
    layers = nn.Sequential()
    for _ in range(number):
        layer = GradientCheckpointingLayer()
        layer.weight = nn.Parameter(torch.zeros(1))
        layer.gradient_checkpointing = True
        layers.append(layer)
    return layers


def test_no_more_layers_are_recomputed_than_memory_requires():
    a_layer, inputs = 100, 40  # ten layers; a recomputed one keeps only its input, 4

    def number(room: float) -> int:
        return layers_to_recompute(10, kept=10 * a_layer, inputs=inputs, room=room)

    assert number(1_000) == 0
    for room in range(50, 1_000, 7):
        layers = number(room)
        kept = (10 - layers) * a_layer + layers * inputs / 10
        assert kept <= FILLED_BY_CHOICE * room or layers == 10
        if layers > 1:  # with one layer less, too much would be kept
            assert kept + a_layer - inputs / 10 > FILLED_BY_CHOICE * room
    assert number(0) == number(-5) == 10, "the model alone fills the device"
