"""Fused LoRA layers give PEFT's outputs and gradients, and leave to PEFT the cases that they do not cover."""

import copy
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from atomtune.model.fused_lora import Casts, Group, compute_together, groups_of, keep_mask
from tests.model.test_layout_support import build, with_adapter

IDS = torch.tensor([[5, 9, 3, 11, 60, 2, 7]])
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def together(model: Any) -> Any:
    assert compute_together(model, input_ids=IDS) > 0
    return model


def gradients_of(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(input_ids=IDS).logits
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(ours: Any, theirs: Any, **tolerance: float) -> None:
    out, gradients = gradients_of(ours)
    expected, expected_gradients = gradients_of(theirs)
    torch.testing.assert_close(out, expected, **tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert expected_gradients[name].any()
        torch.testing.assert_close(gradient, expected_gradients[name], **tolerance, msg=lambda said, n=name: n + said)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "granite"])
def test_fused_layers_give_pefts_outputs_and_gradients(family):
    plain = with_adapter(build(family))
    assert_equal(together(copy.deepcopy(plain)), plain, rtol=1e-6, atol=1e-9)  # RMSNorm computes in float32


def test_the_bias_of_a_base_layer_is_added():
    # As in Qwen2. A new model's biases are zero, so a missing one would not show.
    plain = with_adapter(build("llama", attention_bias=True, mlp_bias=True))
    draw = torch.Generator().manual_seed(0)
    for name, weight in plain.named_parameters():
        if name.endswith("bias"):
            weight.data.copy_(torch.randn(weight.shape, generator=draw))
    assert_equal(together(copy.deepcopy(plain)), plain, rtol=1e-6, atol=1e-9)  # RMSNorm computes in float32


def test_layers_that_read_one_tensor_are_a_group():
    model = with_adapter(build("llama"))
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    groups = [[names[id(layer)] for layer in members] for members in groups_of(model, input_ids=IDS)]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2


def test_conv1d_layers_are_left_to_peft():
    # GPT-2 has transposed Conv1D layers, whose adapters must stay PEFT's.
    assert groups_of(with_adapter(build("gpt2")), input_ids=IDS) == []


def test_layers_with_a_trained_bias_are_left_to_peft():
    # An adapter with bias "all" or "lora_only", in further training: a group passes no gradient to biases.
    model = with_adapter(build("llama", attention_bias=True))
    for name, weight in model.named_parameters():
        if name.endswith("q_proj.base_layer.bias"):
            weight.requires_grad = True
    grouped = [layer for members in groups_of(model, input_ids=IDS) for layer in members]
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module in grouped}
    assert "q_proj" not in names and {"k_proj", "v_proj", "o_proj"} <= names
    assert_equal(together(copy.deepcopy(model)), model, rtol=1e-6, atol=1e-9)  # RMSNorm computes in float32


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_layers_that_compute_more_than_plain_lora_are_left_to_peft(kind):
    # An adapter of another tool, in further training: a group knows neither magnitudes nor the bias of B.
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "k_proj", "down_proj"], **kind)
    assert groups_of(get_peft_model(build("llama").float(), config), input_ids=IDS) == []


def test_layers_with_two_active_adapters_are_left_to_peft():
    model = with_adapter(build("llama"))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    assert groups_of(model, input_ids=IDS) == []


def test_autocast_to_another_dtype_is_left_to_peft():
    # As of a run with --bf16 on a float32 base.
    plain = with_adapter(build("llama").float())
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(together(copy.deepcopy(plain)), plain, rtol=0, atol=0)


def test_a_group_computes_in_its_own_dtype_with_and_without_autocast():
    # Left to PEFT, the results are the same, only slower.
    model = with_adapter(build("llama"))
    for dtype in (torch.float64, torch.bfloat16):
        group = Group(groups_of(model.to(dtype), input_ids=IDS)[0])
        x = torch.zeros(7, 32, dtype=dtype)
        assert group.computes(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert group.computes(x) == (dtype is torch.bfloat16)


def test_groups_of_unlike_dtypes_are_cast_apart():
    model = with_adapter(build("llama"))
    groups = [Group(members) for members in groups_of(model, input_ids=IDS)]
    for layer in groups[0].members:
        layer.base_layer.float()
    Casts(groups).refresh(model.train(), ())
    assert [group.cast.down.dtype for group in groups] == [torch.float32, *[torch.float64] * 7]


def test_finding_groups_draws_no_random_numbers():
    # Otherwise the dropout of a run would depend on whether its layers are fused.
    model = with_adapter(build("llama")).train()
    for layer in (module for module in model.modules() if hasattr(module, "lora_A")):
        layer.lora_dropout["default"] = nn.Dropout(0.3)
    before = torch.get_rng_state()
    groups_of(model, input_ids=IDS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_adapters_has_no_groups():
    assert groups_of(build("llama"), input_ids=IDS) == []


def test_layers_that_are_called_twice_are_left_to_peft():
    class Twice(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: torch.Tensor) -> Any:
            self.inner(input_ids=input_ids)
            return self.inner(input_ids=input_ids + 1)

    assert groups_of(Twice(with_adapter(build("llama"))), input_ids=IDS) == []


def test_a_group_with_a_layer_that_is_called_again_is_left_to_peft():
    class Again(nn.Module):
        def __init__(self, q: nn.Module, k: nn.Module) -> None:
            super().__init__()
            self.q, self.k = q, k

        def forward(self, x: torch.Tensor) -> Any:
            return self.q(x), self.k(x), self.q(x + 1)

    q, k, _ = groups_of(with_adapter(build("llama")), input_ids=IDS)[0]
    assert groups_of(Again(q, k), x=torch.zeros(7, 32, dtype=torch.float64)) == []


def test_logits_without_gradients_equal_pefts_bit_for_bit():
    # Evaluation, verify and the demo's samples must equal what any program with PEFT computes.
    plain = with_adapter(build("llama")).to(torch.bfloat16)
    model = together(copy.deepcopy(plain))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_disabled_and_merged_adapters_behave_as_in_peft():
    plain = with_adapter(build("llama"))
    model = together(copy.deepcopy(plain))
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, **EXACT)
    with_it = model(input_ids=IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, with_it, rtol=1e-6, atol=1e-9)
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, with_it, rtol=1e-6, atol=1e-9)


def test_a_saved_fused_model_is_loaded_by_peft_with_the_same_logits(tmp_path):
    model = together(with_adapter(build("llama")))
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)


def test_an_output_nobody_uses_gets_no_gradient():
    model = with_adapter(build("llama"))
    q, k, v = next(m for m in groups_of(model, input_ids=IDS) if len(m) == 3)
    x = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    out = Group((q, k, v)).output_of(q, x)
    out.sum().backward()
    assert q.lora_B["default"].weight.grad.any()
    assert k.lora_B["default"].weight.grad is None
    expected = torch.autograd.grad(q(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, **EXACT)


def test_a_group_that_gets_another_input_does_not_return_what_it_computed_before():
    # Another trainer may call only some of the layers, and then all of them with the next input.
    q, k, _ = next(m for m in groups_of(with_adapter(build("llama")), input_ids=IDS) if len(m) == 3)
    first, second = torch.randn(2, 7, 32, dtype=torch.float64)
    group = Group((q, k))
    group.output_of(q, first)
    torch.testing.assert_close(group.output_of(k, second), k(second), **EXACT)


def test_a_group_keeps_no_input_once_every_layer_has_its_output():
    # Kept until the next forward, the inputs of all groups would take as much memory as a model's activations.
    (layer,) = next(m for m in groups_of(with_adapter(build("llama")), input_ids=IDS) if len(m) == 1)
    group, x = Group((layer,)), torch.randn(7, 32, dtype=torch.float64)
    group.output_of(layer, x)
    kept = weakref.ref(x)
    del x
    assert kept() is None


def test_layers_of_unlike_ranks_are_fused():
    # An adapter with a rank_pattern, in further training.
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj", "k_proj", "v_proj"],
        rank_pattern={"q_proj": 1, "v_proj": 6},
        init_lora_weights=False,
    )
    plain = get_peft_model(build("llama"), config).double()
    assert_equal(together(copy.deepcopy(plain)), plain, rtol=1e-6, atol=1e-9)  # RMSNorm computes in float32


def test_a_layer_called_with_more_than_an_input_is_left_to_peft():
    # PEFT's `adapter_names` chooses the adapter of each sequence.
    model = together(with_adapter(build("llama")))
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    out = layer(x, adapter_names=["__base__", "default"])
    torch.testing.assert_close(out[0], layer.base_layer(x[0]), **EXACT)
    torch.testing.assert_close(out[1], layer(x[1]), **EXACT)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_dropout_keeps_elements_with_the_right_probability(p):
    torch.manual_seed(1)
    keep = keep_mask(torch.empty(997, 1_003), p)
    assert keep.dtype == torch.bool
    share = 1 - keep.double().mean().item()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / keep.numel()) ** 0.5)
    neighbours = (keep[:, 1:] == keep[:, :-1]).double().mean().item()  # four elements share a 64-bit number
    assert neighbours == pytest.approx(1 - 2 * p * (1 - p), abs=3e-3)


def test_in_eval_mode_nothing_is_dropped():
    # The trial of layouts and verify compute gradients in eval mode.
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False
    )
    model = get_peft_model(build("llama"), config).double().eval()
    assert_equal(together(copy.deepcopy(model)), model, rtol=1e-6, atol=1e-9)  # RMSNorm computes in float32


def test_dropout_masks_differ_per_call_and_follow_the_seed():
    torch.manual_seed(1)
    first, second = keep_mask(torch.empty(64, 64), 0.5), keep_mask(torch.empty(64, 64), 0.5)
    torch.manual_seed(1)
    assert not torch.equal(first, second)
    assert torch.equal(keep_mask(torch.empty(64, 64), 0.5), first)


def test_backward_uses_the_dropout_mask_of_forward():
    # Compared with plain autograd with the same mask; catches a mask drawn twice, or not scaled by 1 / (1 - p).
    model = with_adapter(build("llama")).train()
    layer = next(m for m in groups_of(model, input_ids=IDS) if len(m) == 1)[0]
    layer.lora_dropout["default"] = nn.Dropout(0.3)
    x = torch.randn(40, 32, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    out = Group((layer,)).output_of(layer, x)
    torch.manual_seed(3)
    keep = keep_mask(x, 0.3)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dropped = x * keep / 0.7
    expected = nn.functional.linear(x, layer.base_layer.weight) + (dropped @ a.T @ b.T) * layer.scaling["default"]
    torch.testing.assert_close(out, expected, **EXACT)
    draw = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (x, a, b), draw), torch.autograd.grad(expected, (x, a, b), draw), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_a_layer_in_training_has_the_same_dropout_without_gradients():
    # Reentrant checkpointing computes a layer without gradients first, and again with them in the backward pass.
    model = with_adapter(build("llama"))
    for layer in (module for module in model.modules() if hasattr(module, "lora_A")):
        layer.lora_dropout["default"] = nn.Dropout(0.3)
    model = together(model).train()
    torch.manual_seed(3)
    with torch.no_grad():
        first = model(input_ids=IDS).logits
    torch.manual_seed(3)
    assert torch.equal(model(input_ids=IDS).logits, first)


def step(model: Any) -> None:
    out = model(input_ids=IDS).logits
    out.square().mean().backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data -= weight.grad / weight.grad.norm()  # through .data, as some other optimizers do
                weight.grad = None


@pytest.mark.parametrize("scales", ["equal", "unlike"])
def test_weights_are_cast_again_in_every_step(scales):
    # Weights are cast once, before the layers run. Catches a copy that outlives its step: training on old weights.
    plain = with_adapter(build("llama"))
    if scales == "unlike":
        for number, layer in enumerate(m for m in plain.modules() if hasattr(m, "lora_A")):
            layer.scaling["default"] = 1.0 + number / 4
    model = together(copy.deepcopy(plain))
    for _ in range(3):
        step(model)
        step(plain)
        assert_equal(model, plain, rtol=1e-5, atol=1e-8)
        model.zero_grad()
        plain.zero_grad()


def test_a_layer_called_alone_uses_its_current_weights():
    # Another trainer may call a layer without a forward of the whole model before.
    model = together(with_adapter(build("llama")).to(torch.bfloat16))
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    model(input_ids=IDS)
    x = torch.randn(7, 32, dtype=torch.bfloat16)
    before = layer(x)
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before - layer.base_layer(x), rtol=5e-2, atol=5e-2)
