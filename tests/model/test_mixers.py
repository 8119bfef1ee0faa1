"""Mixers: found by what they do to a sequence, and the probe that finds them leaves the model as it was."""

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from atomtune.model.loss import innermost
from atomtune.model.mixers import find_mixers
from tests.hybrids import hybrid
from tests.tiny import CAPPED, SIZE


def test_the_probe_leaves_the_model_as_it_was():
    model = hybrid("qwen3_5_text")
    inner = innermost(model)
    inner.model.norm = nn.Sequential(inner.model.norm, nn.Dropout(0.5))
    model.train()
    inner.set_attn_implementation("eager")

    def state():
        hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
        gradients = [weight.grad is None for weight in model.parameters()]
        modes = [part.training for part in model.modules()]
        return hooks, gradients, modes, inner.config._attn_implementation, torch.get_rng_state().tolist()

    before = state()
    assert len(find_mixers(inner)[0]) == 2
    assert state() == before


class Angles(nn.Module):
    """Uses all tokens, but has no gradient, like positions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().cumsum(1)


class Router(nn.Linear):
    """A score per token and expert, [T, 8]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class Shift(nn.Module):
    """Mixes tokens, as a part of a mixer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, 1)


class Mean(nn.Module):
    """Mixes tokens: each output is the normalized mean of all inputs so far; called as named by the test."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, width)
        self.angles, self.router, self.shifts = Angles(), Router(width, 8), nn.ModuleList([Shift()])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        for part in (self.angles, self.router, *self.shifts):
            part(x)
        means = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]  # [1, T, D]
        return functional.layer_norm(self.out(means), x.shape[-1:]), None


class ByName(nn.Module):
    """Calls a layer with its input by name, and twice, as models do that share a layer."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.part(x=self.part(x=hidden)[0])[0]


def test_a_layer_of_any_name_that_mixes_tokens_is_found_once(models):
    inner = innermost(AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float64))
    assert find_mixers(inner) == ([], {None}), "attention and MLPs are none"
    mean = Mean(inner.config.hidden_size).double()
    for layer in inner.model.layers:
        layer.mlp = ByName(mean)
    assert find_mixers(inner) == ([mean], {None})


def test_the_probe_computes_as_in_training():
    # Without a gradient, bitsandbytes repacks 4-bit layers for good.
    inner = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZE, vocab_size=97))
    inner.requires_grad_(requires_grad=False)
    as_in_training = []
    for layer in inner.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, out: as_in_training.append(out.requires_grad))
    find_mixers(inner)
    assert as_in_training[:2] == [True, True]


def test_the_windows_of_attention_are_observed():
    config = AutoConfig.for_model("gemma2", **CAPPED)
    assert find_mixers(AutoModelForCausalLM.from_config(config))[1] == {16, None}
    inner = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZE, vocab_size=97))
    assert find_mixers(inner)[1] == {None}
    inner.model.layers[0].self_attn.sliding_window = 7  # some models have it, but do not pass it on
    assert find_mixers(inner)[1] == {7, None}
