"""Tiny models with layers that carry a state from token to token, in float64, with an adapter that is not new."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from atomtune.model.adapter import LoraSpec, new_adapter
from tests.tiny import CHATML, tokenizer_of

WORDS = 211
_SIZE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DELTA_NET = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
#: family → its config
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_SIZE, **DELTA_NET, **_EXPERTS},
    "qwen3_5_text": {**_SIZE, **DELTA_NET},
    "lfm2": {**_SIZE, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "mamba": {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "state_size": 4,
        "num_hidden_layers": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    },
    "mamba2": {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 2,
        "num_hidden_layers": 2,
        "chunk_size": 16,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    },
}
#: The layers that the tests adapt.
_TARGETS = {
    "qwen3_next": ["in_proj_qkvz", "out_proj", "q_proj", "o_proj"],
    "qwen3_5_text": ["in_proj_qkv", "in_proj_a", "out_proj", "q_proj", "o_proj", "down_proj"],
    "lfm2": ["in_proj", "out_proj", "q_proj", "w2"],
    "mamba": ["in_proj", "x_proj"],
    "mamba2": ["in_proj"],
}


def hybrid(family: str) -> Any:
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **HYBRIDS[family], use_cache=False)
    # torch's grouped matrix product for experts does not support float64.
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager").eval()
    base.requires_grad_(False)
    model = new_adapter(base, LoraSpec(rank=4, alpha=8, dropout=0.0, targets=_TARGETS[family])).double().eval()
    draw = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * (0.3 if "lora_A" in name else 0.1))
    return model


#: family → config of a model for whole runs
WALKED: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**_SIZE, **DELTA_NET},
    "gpt_oss": {
        **_SIZE,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # PEFT treats layers of its shared expert and its first, dense layer as if they were experts'.
    "glm4_moe": {
        **_SIZE,
        "num_hidden_layers": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    # Its two blocks with attention share their matrices.
    "zamba2": {
        **_SIZE,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "mamba_d_state": 8,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "use_mamba_kernels": False,
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "head_dim": None,
    },
}


def write_walked(family: str, folder: Path) -> Path:
    """Save a model of this family in float32, with a tokenizer like Qwen's."""
    tokenizer = tokenizer_of("bytes", CHATML)
    tokenizer.save_pretrained(folder)
    words = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **{**WALKED[family], **words, "pad_token_id": None})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
