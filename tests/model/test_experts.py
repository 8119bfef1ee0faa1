"""Experts are found by their shape; LoRA on them is loaded by PEFT, equal in rows, and keeps other layers' dropout."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from atomtune.errors import BadSettings
from atomtune.export.merged_weights import compare_weights, merge_weights
from atomtune.model.adapter import LoraSpec, has_expert_layers, new_adapter, start_from_weights
from atomtune.model.experts import count_of, endings, experts_of, numbers_of_experts
from atomtune.model.layout_support import why_padded
from tests.model.test_lora_targets import SIZE
from tests.steps import Counted

_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GLM = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
#: family → (config values, weights of experts, layers that PEFT treats as experts')
FAMILIES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "qwen3_moe": ({**_ROUTED, "num_experts": 4, "head_dim": 8}, {"gate_up_proj", "down_proj"}, set()),
    # Its matrices are transposed, and its experts have biases.
    "gpt_oss": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 16},
        {"gate_up_proj", "down_proj"},
        set(),
    ),
    "glm4_moe": (
        {**_ROUTED, **_GLM, "head_dim": 8},
        {"gate_up_proj", "down_proj"},
        {"gate_proj.weight", "up_proj.weight", "down_proj.weight"},
    ),
}


def tiny(family: str, **more: Any) -> Any:
    torch.manual_seed(3)
    values = FAMILIES[family][0] if family in FAMILIES else {}
    config = AutoConfig.for_model(family, **{**SIZE, **values, **more, "initializer_range": 0.2}, use_cache=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def adapted(family: str, *, dropout: float = 0.1) -> Any:
    """A model with an adapter, also on experts, as after some training."""
    lora = LoraSpec(rank=2, alpha=4, dropout=dropout, targets=["all-linear"], experts=True)
    model = new_adapter(tiny(family), lora)
    draw = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * 0.1)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(5, 45)[None]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_found_with_their_share_of_the_weights(family):
    base = tiny(family)
    experts = experts_of(base)
    assert {name.rpartition(".")[2] for name in experts.tensors} == FAMILIES[family][1]
    in_experts = sum(weight.numel() for name, weight in base.named_parameters() if name in experts.tensors)
    assert experts.share == in_experts / sum(weight.numel() for weight in base.parameters())


def test_other_three_dimensional_weights_are_not_taken_for_experts():
    # RecurrentGemma's gates are one matrix per head, and LFM2 has one kernel per channel.
    gates = tiny(
        "recurrent_gemma", lru_width=32, num_hidden_layers=3, block_types=["recurrent", "recurrent", "attention"]
    )
    kernels = tiny("lfm2", layer_types=["conv", "full_attention"], num_experts=32)
    assert any(weight.dim() == 3 for weight in gates.parameters())
    assert any(weight.dim() == 3 for weight in kernels.parameters())
    assert not experts_of(gates)
    assert not experts_of(kernels)


def test_experts_that_are_layers_in_a_list_are_found():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([*(nn.Linear(4, 4, bias=False) for _ in range(2)), Conv1D(4, 4)])
            self.shared_experts = nn.Linear(4, 4, bias=False)

    base = tiny("llama")
    base.model.layers[0].mlp = Layer()
    experts = experts_of(base)
    assert experts.layers == tuple(f"model.layers.0.mlp.experts.{i}" for i in range(3))
    assert experts.share == (3 * 4 * 4 + 4) / sum(weight.numel() for weight in base.parameters())
    beside, of_experts = (LoraSpec(rank=2, alpha=4, dropout=0.0, targets=[name]) for name in ("q_proj", "2"))
    assert has_expert_layers(new_adapter(base, of_experts))
    assert not has_expert_layers(new_adapter(tiny("llama"), beside))
    assert not has_expert_layers(adapted("qwen3_moe")), "their experts are one tensor, which is in every step"


def test_many_expert_layers_are_found_in_linear_time(monkeypatch):
    # DeepSeek-V3's own code has 45,000; searching them in a list took minutes.
    base = tiny("llama")
    with torch.device("meta"):
        linear = nn.Linear(1, 1, bias=False)
        base.model.layers[0].experts = nn.ModuleList(copy.copy(linear) for _ in range(1_000))
    named = base.named_modules
    counted = lambda *of, **which: ((Counted(name), module) for name, module in named(*of, **which))  # noqa: E731
    monkeypatch.setattr(base, "named_modules", counted)
    monkeypatch.setattr(Counted, "comparisons", 0)
    assert len(experts_of(base).layers) == 1_000
    assert 0 < Counted.comparisons < 100  # each of the 21 weights once; in a list, with each of 1,000 layers


def test_a_short_name_of_tensors_stands_only_for_the_wanted_ones():
    base = nn.ModuleDict({name: nn.ModuleDict({"experts": nn.Linear(2, 2)}) for name in "ab"})
    both = ["a.experts.weight", "b.experts.weight"]
    assert endings(base, both) == ["experts.weight"]
    assert endings(base, both[:1]) == both[:1]


def test_a_weight_in_four_bits_counts_with_its_unpacked_size():
    assert count_of(SimpleNamespace(shape=(16, 1), quant_state=SimpleNamespace(shape=(8, 4)))) == 32
    assert count_of(SimpleNamespace(shape=(8, 4), quant_state=None)) == 32, "not quantized yet"


def test_lora_on_experts_is_refused_for_a_model_without_experts():
    with pytest.raises(BadSettings, match="has no experts"):
        new_adapter(tiny("llama"), LoraSpec(rank=2, alpha=4, dropout=0.0, targets=["all-linear"], experts=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_stays_frozen_and_every_weight_gets_a_gradient(family):
    model = adapted(family)
    tensors = set(model.peft_config["default"].target_parameters)
    assert tensors == {f"experts.{name}" for name in FAMILIES[family][1]} | FAMILIES[family][2]
    model(input_ids=torch.arange(5, 95)[None]).logits.square().sum().backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert [name for name, weight in trained.items() if weight.grad is None or not weight.grad.any()] == []
    assert not [name for name in trained if "router" in name or ".gate." in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_adapted_experts_give_the_results_of_single_records(family):
    assert why_padded(adapted(family)) is None


def test_layers_beside_experts_keep_their_dropout_and_the_config_has_none(tmp_path):
    model = adapted("glm4_moe", dropout=0.1)
    assert model.peft_config["default"].lora_dropout == 0  # PEFT refuses any other value together with adapted tensors
    of_layers, of_tensors = set(), set()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            (of_tensors if isinstance(module, ParamWrapper) else of_layers).add(str(module.lora_dropout["default"]))
    assert of_layers == {"Dropout(p=0.1, inplace=False)"}
    assert of_tensors == {"Identity()"}

    model.save_pretrained(tmp_path)
    notices: list[str] = []
    lora = LoraSpec(rank=2, alpha=4, dropout=0.1, targets=["all-linear"], experts=True)
    file = tmp_path / "adapter_model.safetensors"
    again = start_from_weights(tiny("glm4_moe"), file, lora, notice=notices.append)
    layer = again.get_base_model().model.layers[0].self_attn.q_proj
    assert str(layer.lora_dropout["default"]) == "Dropout(p=0.1, inplace=False)"
    assert torch.equal(logits(again.eval()), logits(model))
    assert notices == []


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_loads_a_saved_expert_adapter(family, tmp_path):
    model = adapted(family)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(family), str(tmp_path)).eval()
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(again), logits(tiny(family)), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_experts_are_base_plus_adapter(family):
    merged = merge_weights(adapted(family))
    assert torch.allclose(logits(merged), logits(adapted(family)), atol=1e-4)  # float32: one rounding of W + BA
    compared = compare_weights(adapted(family), merged)
    assert compared.problems == ()
    name = experts_of(merged).tensors[0]
    merged.get_parameter(name).data[1, 0, 0] += 1e-4
    (problem,) = compare_weights(adapted(family), merged).problems
    assert problem == f"{name}: 1 of {merged.get_parameter(name).numel():,} numbers are not base + adapter"


def test_only_whole_numbers_above_one_in_a_config_may_count_experts():
    # One shared expert, or a flag (True equals 1), would make every weight of shape [1, …, …] an expert.
    values = {
        "num_experts": 8,
        "n_shared_experts": 1,
        "use_expert_bias": True,
        "expert_dropout": 0.5,
        "moe_experts": [2, 4],
    }
    text = SimpleNamespace(to_dict=lambda: values)
    assert numbers_of_experts(SimpleNamespace(get_text_config=lambda: text)) == {8, 2, 4}
