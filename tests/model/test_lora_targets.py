"""LoRA targets: all-linear is every layer that an adapter can adapt, and trains with the default dropout."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from atomtune.errors import BadModel, BadSettings
from atomtune.limits import try_in_child_process
from atomtune.model import lora_targets
from atomtune.model.adapter import LoraSpec, new_adapter
from atomtune.model.lora_targets import all_linear, match_targets, refuse_endless_patterns

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
#: family → (config values, kinds of layers that are adapted, kinds of linear layers that are left out)
FAMILIES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "llama": ({}, {*ATTENTION, "gate_proj", "up_proj", "down_proj"}, set()),
    "qwen3_moe": (
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        ATTENTION,
        set(),
    ),
    # In this architecture PEFT treats a dense gate_proj like the experts', so the first, dense layer has no LoRA there.
    "glm4_moe": (
        {
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        ATTENTION,
        {"gate_proj", "up_proj", "down_proj"},
    ),
    "phimoe": ({"num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION, {"router"}),
    # Its router is a small network of linear layers.
    "zaya": (
        {},
        {"q_proj", "k_proj", "v_proj_current", "v_proj_delayed", "o_proj"},
        {"gate"},
    ),
    # Its router is the only layer inside `gate` and does not have "router" in its name.
    "hunyuan_v1_moe": (
        {"head_dim": 8, "num_experts": 6, "moe_topk": 2, "moe_intermediate_size": 16},
        ATTENTION,
        {"gate", "gate_proj", "up_proj", "down_proj"},
    ),
    # A shared expert's gate has one output.
    "qwen2_moe": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        {*ATTENTION, "gate_proj", "up_proj", "down_proj"},
        {"shared_expert_gate"},
    ),
    # Its indexer only selects the keys to read, and a selection passes no gradient.
    "deepseek_v32": (
        {
            **LATENT,
            "head_dim": 4,
            "index_topk": 16,
            "index_head_dim": 16,
            "index_n_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 0,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
        {"wk", "wq_b", "weights_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    # Its linear layers have their own class with their own forward, which computes the same.
    "falcon": ({}, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, set()),
    "mamba2": (
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16},
        {"in_proj"},
        {"out_proj"},
    ),
    "jamba": (
        {
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        {*ATTENTION, "in_proj", "x_proj", "out_proj", "gate_proj", "up_proj", "down_proj"},
        {"dt_proj"},
    ),
}


def tiny(family: str) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **{**SIZE, **FAMILIES[family][0]}, use_cache=False)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_selects_the_layers_that_an_adapter_can_reach(family):
    base = tiny(family)
    _, adapted, left_out = FAMILIES[family]
    assert set(match_targets(base, ["all-linear"])) == adapted
    assert all_linear(base).left_out.keys() == left_out


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_all_linear_gets_a_gradient_with_the_default_dropout(family):
    model = new_adapter(tiny(family), LoraSpec(rank=2, alpha=4, dropout=0.05, targets=["all-linear"])).train()
    ids = torch.randint(3, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in trained}
    assert adapted == FAMILIES[family][1]
    assert [name for name, weight in trained.items() if weight.grad is None] == []


def test_layers_in_a_module_list_are_named_after_the_list():
    base = tiny("llama")
    base.model.layers[0].mlp.gate_proj = torch.nn.Sequential(torch.nn.Linear(32, 48))
    counts = match_targets(base, ["all-linear"])
    assert counts["gate_proj"] == 2 and "0" not in counts


def test_a_grouped_linear_layer_is_left_out_with_the_reason():
    grouped = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4").DeepseekV4GroupedLinear
    base = tiny("llama")
    base.model.layers[0].self_attn.o_proj = grouped(8, 32, 4)
    assert all_linear(base).left_out["o_proj"] == "not computed like a linear layer"


def test_a_router_of_a_remote_code_model_gets_no_adapter():
    base = tiny("llama")
    base.config.num_experts = 6
    for layer, outputs in zip(base.model.layers, (6, 32), strict=True):  # six experts; the second gate is no router
        layer.mlp.gate = torch.nn.Linear(32, outputs)
        layer.mlp.register_forward_hook(lambda mlp, _inputs, out: out * mlp.gate(out).mean(-1, keepdim=True))
    found = all_linear(base)
    assert found.left_out == {"gate": "a router"}
    assert [name for name in found.adapted if name.endswith("gate")] == ["model.layers.1.mlp.gate"]


def test_a_router_or_gate_named_in_lora_targets_is_refused():
    # The guide says that they stay frozen: a trained router sends tokens to experts that were not trained on them.
    for family, target in (("phimoe", "router"), ("hunyuan_v1_moe", "wg"), ("qwen2_moe", "shared_expert_gate")):
        with pytest.raises(BadSettings, match=rf"--lora_targets {target}: model\.layers\.0.* stay frozen here"):
            match_targets(tiny(family), ["q_proj", target])


def test_a_target_name_shared_with_a_router_selects_only_other_layers():
    base = tiny("llama")
    base.model.layers[0].mlp.router = torch.nn.ModuleDict({"down_proj": torch.nn.Linear(32, 6)})  # as in Zaya
    assert match_targets(base, ["down_proj"]) == {"down_proj": 2}
    adapted = new_adapter(base, LoraSpec(rank=2, alpha=4, dropout=0.0, targets=["down_proj"]))
    assert not any("router" in name for name, weight in adapted.named_parameters() if weight.requires_grad)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_an_adapter_regex_that_never_finishes_is_refused_naming_the_file(models, key, monkeypatch):
    monkeypatch.setattr(lora_targets, "try_in_child_process", partial(try_in_child_process, seconds=1))
    base = AutoModelForCausalLM.from_pretrained(models("llama"))
    regex = r"((\w|\w\w|\.)+)+!"
    config = LoraConfig(target_modules=["q_proj"])
    setattr(config, key, {regex: 4} if key == "rank_pattern" else regex)
    with pytest.raises(BadModel, match=r"adapter_config\.json: the regex .* did not finish within"):
        refuse_endless_patterns(config, base, Path("adapter_config.json"))


def test_an_invalid_adapter_regex_is_refused_and_a_valid_one_passes(models):
    base = AutoModelForCausalLM.from_pretrained(models("llama"))
    with pytest.raises(BadModel, match="is not a regex"):
        refuse_endless_patterns(LoraConfig(target_modules="("), base, Path("adapter_config.json"))
    refuse_endless_patterns(LoraConfig(target_modules=r".*\.(q|v)_proj"), base, Path("adapter_config.json"))
