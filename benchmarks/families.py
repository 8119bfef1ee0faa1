"""Which families of models can be trained, and how? A table of tiny models of the installed transformers.

    python -m benchmarks.families                  prints the table
    python -m benchmarks.families --write          and writes it to docs/models.md
    python -m benchmarks.families qwen3_moe lfm2   some families
    python -m benchmarks.families --json old.json  with another transformers, to be given to --beside here

Each model gets random weights, an adapter with the default settings, and the layout that `train` chooses. Its loss,
log-probabilities and adapter gradients are compared with plain transformers + PEFT on one record at a time. For a tree
layout, one step on records with a shared prefix is also timed against the same step on padded rows, in turn.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import statistics
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from atomtune.batch.collate import Collator
from atomtune.batch.row import padded_tokens
from atomtune.batch.tree import graft
from atomtune.choices import Layout
from atomtune.data.records import Example
from atomtune.errors import AtomtuneError
from atomtune.model.adapter import LoraSpec, new_adapter
from atomtune.model.agreement import another_plain_way
from atomtune.model.attention_in_use import AttentionInUse
from atomtune.model.auto_class import auto_class
from atomtune.model.fused_layers import fuse_layers
from atomtune.model.layout_support import collator_for, why_padded
from atomtune.model.load import keep_soft_caps, quiet_libraries
from atomtune.model.lora_targets import match_targets
from atomtune.model.loss import innermost, target_nats
from atomtune.settings.fields import LoraSettings
from atomtune.verify import Result, in_batches, one_at_a_time
from benchmarks import checkpoints

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
WORDS = 512
#: A layout counts as equal within these, or within so many times the difference of two plain runs (float32).
_EQUAL_LOSS, _EQUAL_GRADIENT, _TIMES_NOISE = 1e-5, 1e-4, 20.0
#: A limit whatever the noise is: if two plain runs have different gradients, a comparison shows nothing.
_MOST_GRADIENT = 0.3

#: Length of a prefix that records share: longer than a chunk of linear attention and than every window used here.
SHARED_TOKENS = 70
#: The timed step: records, tokens of the shared prefix, tokens of their own; and the number of timed pairs.
_TIMED_RECORDS, _TIMED_TRUNK, _TIMED_OWN, _PAIRS = 16, 200, range(24, 57), 3

Values = dict[str, Any]
_TOKENS: Values = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZE: Values = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # With the usual 0.02 a model this small predicts nearly uniformly, and a fault would hardly show.
    "initializer_range": 0.15,
}
_HEAD: Values = {"head_dim": 16}
_WINDOW: Values = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_FOUR: Values = {"num_hidden_layers": 4}
_TWICE_WINDOW: Values = {**_WINDOW, **_FOUR, "layer_types": 2 * ["sliding_attention", "full_attention"]}
_LATENT: Values = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
_EXPERTS: Values = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS: Values = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: Values = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_THREE_TO_ONE: Values = {**_FOUR, "layer_types": [*3 * ["linear_attention"], "full_attention"]}
_DELTA: Values = {
    **_THREE_TO_ONE,
    **_HEAD,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_SHARED: Values = {**_EXPERTS, "shared_expert_intermediate_size": 32}
_MAMBA: Values = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
}
_CONVOLUTIONS: Values = {**_FOUR, "layer_types": ["conv", "conv", "full_attention", "conv"]}
_BYTES: Values = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "hidden_size_global": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
}
_PER_LAYER: Values = {
    **_TWICE_WINDOW,
    **_HEAD,
    "vocab_size_per_layer_input": WORDS,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
}

#: kind of layers → family → config values beyond _SIZE
FAMILIES: dict[str, dict[str, Values]] = {
    "dense": {
        "llama": {},
        "qwen2": {},
        "qwen3": _HEAD,
        "mistral": {"sliding_window": 24},
        "ministral3": _HEAD,
        "gemma": _HEAD,
        "gemma2": {**_HEAD, "sliding_window": 16, "query_pre_attn_scalar": 16},
        "gemma3_text": {**_HEAD, **_WINDOW},
        "phi3": {"sliding_window": 16},
        "olmo2": {},
        "olmo3": _WINDOW,
        "smollm3": {"no_rope_layers": [1, 0]},
        "glm4": _HEAD,
        "cohere": {},
        "cohere2": _WINDOW,
        "exaone4": {**_HEAD, **_WINDOW},
        "apertus": {},
        "hunyuan_v1_dense": _HEAD,
        "seed_oss": _HEAD,
        "granite": {},
        "minicpm3": _LATENT,
    },
    "inputs for each layer, keys that layers share": {
        "gemma3n_text": {
            **_PER_LAYER,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "intermediate_size": 4 * [96],
            "activation_sparsity_pattern": 4 * [0.0],
        },
        "gemma4_text": {**_PER_LAYER, "global_head_dim": 16},
    },
    "experts": {
        "qwen3_moe": {**_HEAD, **_EXPERTS},
        "mixtral": _LOCAL_EXPERTS,
        "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
        "granitemoe": _LOCAL_EXPERTS,
        "gpt_oss": {**_HEAD, **_LOCAL_EXPERTS, **_WINDOW},
        "glm4_moe": {**_HEAD, **_ROUTED},
        "glm4_moe_lite": {**_LATENT, **_ROUTED, "num_hidden_layers": 3},
        "deepseek_v2": {**_LATENT, **_ROUTED},
        "deepseek_v3": {**_LATENT, **_ROUTED, "n_group": 2},
        "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
        "minimax_m2": {**_HEAD, **_LOCAL_EXPERTS},
        "phimoe": _LOCAL_EXPERTS,
        "mistral4": {**_LATENT, **_ROUTED},
        "llama4_text": {
            **_HEAD,
            **_FOUR,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": 16,
            "layer_types": [*3 * ["chunked_attention"], "full_attention"],
        },
    },
    "linear attention, short convolutions": {
        "qwen3_next": {**_DELTA, **_SHARED},
        "qwen3_5_text": _DELTA,
        "qwen3_5_moe_text": {**_DELTA, **_SHARED},
        "olmo_hybrid": _DELTA,
        "kimi_linear": {
            **_LATENT,
            **_THREE_TO_ONE,
            **_LOCAL_EXPERTS,
            "q_lora_rank": None,
            "moe_intermediate_size": 32,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        },
        "minimax": {
            **_HEAD,
            **_LOCAL_EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 16,
        },
        "lfm2": {**_CONVOLUTIONS, "block_auto_adjust_ff_dim": False},
        "lfm2_moe": {**_CONVOLUTIONS, **_EXPERTS, "num_dense_layers": 2},
        # The first six layers include every kind of layer.
        "lfm3": {**_HEAD, "num_hidden_layers": 6, "sliding_window": 16},
        "bailing_hybrid": {
            **_LATENT,
            **_EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "q_lora_rank": None,
            "num_experts_per_token": 2,
            "num_expert_group": 1,
            "topk_group": 1,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        },
        "lara_mini": {
            **_DELTA,
            **_SHARED,
            "sliding_window": 16,
            "layer_types": ["linear_attention", "sliding_attention", "linear_attention", "full_attention"],
        },
    },
    "Mamba": {
        "mamba": {"state_size": 8, "intermediate_size": 128},
        "falcon_mamba": {"state_size": 8, "intermediate_size": 128},
        "mamba2": {
            "intermediate_size": 128,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
        },
        "jamba": {
            **_FOUR,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "granitemoehybrid": {
            **_MAMBA,
            **_LOCAL_EXPERTS,
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "attention"],
        },
        "bamba": {**_MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1], "attn_rotary_emb": 8},
        "falcon_h1": {**_MAMBA, **_HEAD, "mamba_d_ssm": 128},
        "nemotron_h": {
            **_FOUR,
            **_HEAD,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
        "zamba": {
            **_FOUR,
            "layers_block_type": 2 * ["mamba", "hybrid"],
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
            "attention_head_dim": 32,
            "num_key_value_heads": 4,
            "use_mamba_kernels": False,
        },
        "zamba2": {
            **_FOUR,
            "layers_block_type": 2 * ["mamba", "hybrid"],
            "mamba_d_state": 16,
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "chunk_size": 16,
            "num_mem_blocks": 1,
            "use_mamba_kernels": False,
            "num_key_value_heads": 4,
            "attention_head_dim": 32,
        },
        "zaya": {},
    },
    "others": {
        "recurrent_gemma": {
            **_HEAD,
            "lru_width": 64,
            "attention_window_size": 16,
            "num_hidden_layers": 3,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
        "deepseek_v32": {
            **_LATENT,
            **_ROUTED,
            "head_dim": 8,
            "index_topk": 16,
            "index_head_dim": 16,
            # A key that no head selects scores 0, and which of two such keys is read depends on the row's length. With
            # 2 heads every fourth key scores 0; with 64, as in the published model, none.
            "index_n_heads": 64,
        },
        "bloom": {"n_head": 4, "n_layer": 2},
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
        "blt": {
            "encoder_hash_byte_group_vocab": 1024,
            "local_attention_window_len": 16,
            # A random model then cuts a text of 70 bytes into about 60 patches; by default it would make one patch.
            "patching_threshold": 5.7,
            "patcher_config": _BYTES,
            "encoder_config": _BYTES,
            "decoder_config": {**_BYTES, "num_hidden_layers": 2},
            "global_config": {**_BYTES, "num_hidden_layers": 2},
        },
    },
}


#: Values for families that need none of their own: each family takes those that its config knows.
_ANY: Values = {
    **_SIZE,
    **_HEAD,
    **_EXPERTS,
    **_LOCAL_EXPERTS,
    **_ROUTED,
    **_LATENT,
    "num_key_value_heads": 2,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_num_experts": 4,
    "moe_k": 2,
    "sliding_window": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "swa_v_head_dim": 12,
    "global_head_dim": 16,
    "kv_channels": 16,
    "rotary_dim": 8,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "d_model": 64,
    "dff": 96,
    "ffn_dim": 96,
    "num_layers": 2,
    "attention_heads": 4,
}
_LATENT_HEADS: Values = {"num_key_value_heads": 4, "head_dim": 8}
_ROPE: Values = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [3, 3, 2]}
_INKLING_2: Values = {
    "unpadded_vocab_size": WORDS,
    "sliding_window_size": 16,
    "rel_extent": 64,
    "d_rel": 8,
    "n_layers_per_attn_res_block": 1,
}
_SPARSE_LAST: Values = {"mlp_layer_types": ["dense", "sparse"]}
#: Families for which _ANY is enough.
_OF_ANY = """
afmoe apertus1p5_text arcee aria_text beam biogpt bitnet codegen cohere2_moe ctrl cwm deepseek_v4 diffllama doge dory
dots1 ernie4_5 exaone exaone_moe falcon flex_olmo flint gemma4_unified_text glm gpt_bigcode gpt_neox gpt_neox_japanese
gptj granite_swa granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling_text
internlm3 iquestcoder jais2 jetmoe kolibri1 laguna mellum mimo_v2_flash minimax_m3_vl_text ministral modernbert-decoder
mpt nanochat nemotron olmo openai-gpt opt persimmon phi qwen2_moe rwkv sarvam_moe solar_open stablelm starcoder2
vaultgemma xglm
"""
#: family → values beyond _ANY
_BEYOND_ANY: dict[str, Values] = {
    "afmoe": _WINDOW,
    "axk1": _LATENT_HEADS,
    "axk2": _LATENT_HEADS,
    "beam": _SPARSE_LAST,
    "cohere2_moe": _WINDOW,
    "cohere_compass_text": {
        **_WINDOW,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 32, "hidden_size": 64},
    },
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
    },
    "dory": {**_FOUR, "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"]},
    "dots3_note_text": {**_LATENT_HEADS, "layer_types": ["sliding_attention", "indexed_attention"]},
    "exaone_moe": _WINDOW,
    "flint": _WINDOW,
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm_moe_dsa": _LATENT_HEADS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "inkling2_loop_text": {
        **_INKLING_2,
        **_FOUR,
        "layer_types": 2 * ["hybrid_sliding", "hybrid"],
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
        "loop_gate_rank": 8,
    },
    "inkling2_text": {**_INKLING_2, "layer_types": ["hybrid_sliding", "hybrid"]},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"], "sliding_window_size": 16},
    "kolibri1": _WINDOW,
    "longcat_flash": {
        **_LATENT_HEADS,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_block_size": 16},
    "modernbert-decoder": {"local_attention": 32},
    "sarvam_mla": _LATENT_HEADS,
    "xlstm": {"num_heads": 4, "num_blocks": 2},
    "youtu": _LATENT_HEADS,
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "full_attention"],  # full attention with an indexer, as in its checkpoints
        "indexer_n_heads": 64,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "hc_lowrank": 16,
        "ple_embed_dim": 64,
        "ngram_vocab_size_base": 1024,
        "split_ngram_parts": 4,
    },
}

_TWO_SIDED: Values = {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DECODER: Values = {
    "is_decoder": True,
    "is_encoder_decoder": False,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_source_positions": 64,
    "max_target_positions": 512,
}
#: Models that are causal only if their config says so: bidirectional models, and decoders of encoder-decoders. Each
#: takes the values that its config knows.
_DECODERS: dict[str, Values] = {
    "big_bird": {**_TWO_SIDED, "attention_type": "original_full"},
    "bigbird_pegasus": {**_DECODER, "attention_type": "original_full"},
    "rembert": {**_TWO_SIDED, "input_embedding_size": 64},
    "roformer": {**_TWO_SIDED, "embedding_size": 64},
    "xlm": {"emb_dim": 64, "n_heads": 4, "n_layers": 2, "causal": True},
    "xmod": {**_TWO_SIDED, "languages": ["en_XX"], "default_language": "en_XX"},
}
_OF_TWO_SIDED = """
bert bert-generation camembert data2vec-text electra ernie megatron-bert roberta roberta-prelayernorm roc_bert
xlm-roberta xlm-roberta-xl
"""
_OF_DECODER = "bart blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper"
_DECODERS |= dict.fromkeys(_OF_TWO_SIDED.split(), _TWO_SIDED) | dict.fromkeys(_OF_DECODER.split(), _DECODER)

#: Rotary positions in three sections: time, height, width. For text all three are equal.
_THREE_POSITIONS: Values = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
}
_HALF_TURNED: Values = {
    "rope_parameters": {**_THREE_POSITIONS["rope_parameters"], "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
}
_TOWER: Values = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGES: Values = {**_TOWER, "image_size": 32, "patch_size": 16}
_QWEN_TOWER: Values = {"depth": 1, "num_heads": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
_QWEN_3_TOWER: Values = {**_QWEN_TOWER, "deepstack_visual_indexes": [0]}
#: Whole checkpoints with an image tower, tuned on text: family → the configs of text and tower
VISION_LANGUAGE: dict[str, tuple[Values, Values]] = {
    "gemma3": ({**_HEAD, **_WINDOW}, _IMAGES),
    "glm4v": (_HALF_TURNED, _QWEN_TOWER),
    "glm4v_moe": ({**_HEAD, **_ROUTED, **_HALF_TURNED}, _QWEN_TOWER),
    "internvl": ({"model_type": "qwen2"}, {**_TOWER, "image_size": [32, 32], "patch_size": [16, 16]}),
    "lfm2_vl": (
        {"model_type": "lfm2", **_CONVOLUTIONS, "block_auto_adjust_ff_dim": False},
        {"model_type": "siglip2_vision_model", **_TOWER},
    ),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **_IMAGES}),
    "mistral3": ({"model_type": "mistral", **_HEAD, "sliding_window": 16}, {"model_type": "pixtral", **_IMAGES}),
    "paligemma": (
        {"model_type": "gemma2", **_HEAD, "sliding_window": 16, "query_pre_attn_scalar": 16},
        {"model_type": "siglip_vision_model", **_IMAGES, "projection_dim": 64},
    ),
    "qwen2_5_vl": (_THREE_POSITIONS, _QWEN_TOWER),
    "qwen2_vl": (_THREE_POSITIONS, {"depth": 1, "num_heads": 2, "embed_dim": 32, "hidden_size": 64}),
    "qwen3_vl": ({**_HEAD, **_THREE_POSITIONS}, _QWEN_3_TOWER),
    "qwen3_vl_moe": ({**_HEAD, **_EXPERTS, **_THREE_POSITIONS}, _QWEN_3_TOWER),
    "smolvlm": ({"model_type": "llama"}, _IMAGES),
}

#: reason for having no row → names that transformers lists as models that write text
LEFT_OUT: dict[str, str] = {
    "are encoder-decoders, which `train` refuses": """
        florence2 musicgen musicgen_melody pix2struct pp_formulanet t5gemma2 udop vision-encoder-decoder""",
    "need an image, a sound or a state with each text, which `train` says": """
        blip blip-2 idefics instructblip instructblipvideo kosmos-2 kyutai_speech_to_text pi0 voxtral_realtime""",
    "predict tokens for another model and run only with it, which `train` refuses": """
        gemma4_assistant gemma4_unified_assistant""",
    "reads in both directions, which `train` refuses": "diffusion_gemma",
    "fails on padded rows if its config makes it causal, which `train` says": "xlnet",
    "depend on padding, which `train` refuses": "cpmant prophetnet",
    "has no layer that LoRA could adapt, which `train` says": "reformer",
    "fails in transformers 5.24 itself on a text, which `train` says (5.17 trains it; its text part has a row)": """
        llama4""",
    "speak, and their thinking half has a row": "qwen2_5_omni qwen3_omni_moe",
    "classifies instead of writing": "shieldgemma2",
    "is listed but has no automatic class": "evolla",
    "has the class of gpt2": "gpt-sw3",
    "was not built this small": "nemo_speechlm",
}


@dataclass(frozen=True)
class Finding:
    """The result of one family's trial."""

    family: str
    class_name: str = ""
    layout: str = ""
    reason: str = ""  # why the layout is padded, or what failed
    apart: tuple[float, float, float] | None = None  # loss (relative), log-probability (largest), gradient (relative)
    noise: tuple[float, float, float] = (0.0, 0.0, 0.0)  # the same, between two plain runs
    adapted: str = ""
    faster: float | None = None  # time of a step with padded rows / time with the tree
    seconds: float = 0.0

    @property
    def is_equal(self) -> bool:
        if self.apart is None:
            return False
        loss, _, gradient = self.apart
        loss_allowed = max(_EQUAL_LOSS, _TIMES_NOISE * self.noise[0])
        gradient_allowed = min(_MOST_GRADIENT, max(_EQUAL_GRADIENT, _TIMES_NOISE * self.noise[2]))
        return loss <= loss_allowed and gradient <= gradient_allowed

    @property
    def verdict(self) -> str:
        if self.apart is None:
            return "not here" if self.reason.startswith("not in") else "fails"
        return "equal" if self.is_equal else "DIFFERS"


def build(family: str, values: Values) -> Any:
    """A tiny model in float32. Raises ValueError if transformers does not know the family."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(family, **values)
    config.use_cache = False
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    keep_soft_caps(model)
    return model


def families() -> Iterator[tuple[str, str, Values]]:
    """(kind of layers, family, values of its config) for each row."""
    for kind, of_kind in FAMILIES.items():
        for family, values in of_kind.items():
            yield kind, family, {**_SIZE, **values}
    for family, (text, tower) in VISION_LANGUAGE.items():
        yield "images and text, tuned on text", family, {"text_config": {**_SIZE, **text}, "vision_config": tower}
    for family in checkpoints.FAMILIES:
        yield "whole checkpoints, tuned on text", family, checkpoints.values_of(family, _text_values)
    for family in sorted({*_OF_ANY.split(), *_BEYOND_ANY}):
        yield "more", family, _text_values(family)
    for family, values in sorted(_DECODERS.items()):
        what_it_is = {name: value for name, value in values.items() if name.startswith("is_")}
        yield "decoders", family, {**_known(family), **_known(family, values), **what_it_is}


def _text_values(family: str) -> Values:
    """The config values of a family of text models."""
    for of_kind in FAMILIES.values():
        if family in of_kind:
            return {**_SIZE, **of_kind[family]}
    return {**_known(family), **_BEYOND_ANY.get(family, {})}


def _known(family: str, of: Values = _ANY) -> Values:
    """Those of the values in `of` that the family's config knows."""
    if family not in transformers.CONFIG_MAPPING:
        return {}
    config = transformers.CONFIG_MAPPING[family]()
    names = {*config.to_dict(), *config.attribute_map}
    return {name: value for name, value in of.items() if name in names}


def some_examples() -> list[Example]:
    """Records with a prefix longer than a chunk of linear attention, forks at two levels, a repetition, a lone one."""
    draw = Random(3)

    def text(tokens: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, WORDS) for _ in range(tokens))

    long, short = text(SHARED_TOKENS), text(18)
    fork = (*short, *text(17))
    ids = [(*long, *text(n)) for n in (4, 9, 21)] + [(*fork, *text(n)) for n in (3, 12)] + [(*short, *text(6))]
    ids += [text(11), ids[1], (*long, ids[0][70], *text(3))]
    return [
        Example(record, (*9 * [0], *[draw.randint(0, 1) for _ in record[10:]], 1), f"record {number}")
        for number, record in enumerate(ids, 1)
    ]


def examine(family: str, values: Values) -> Finding:
    """Adapt, lay out and compare one family like `train` and `verify` do."""
    base = build(family, values)
    base.requires_grad_(False)
    class_name = type(base).__name__
    lora = LoraSettings()
    counts = match_targets(base, lora.lora_targets)
    model = new_adapter(base, LoraSpec(**{**lora.lora(), "rank": 4})).eval()
    adapted = ", ".join(sorted(counts))
    _as_after_training(model)
    examples = some_examples()
    plain = one_at_a_time(model, examples)
    noise = _noise(model, examples, plain)
    fuse_layers(model, input_ids=torch.zeros(1, 2, dtype=torch.long))
    own_attention = AttentionInUse.of(innermost(model))
    reason = why_padded(model)
    layout: Layout = "tree" if reason is None else "padded"
    collator = collator_for(model, layout, pad_id=0, as_examples=lambda stored: (Example(**stored),))
    ours, _ = in_batches(model, examples, collator, per_batch=len(examples))
    faster = None if reason else _times_faster(model, collator, own_attention)
    return Finding(family, class_name, collator.layout, reason or "", _apart(ours, plain), noise, adapted, faster)


def _times_faster(model: Any, collator: Collator, own_attention: AttentionInUse) -> float:
    """Time of a step with padded rows / time of the same step with a tree: the median of the pairs."""
    inner = innermost(model)
    padded = dataclasses.replace(collator, layout="padded", carries_state=False)
    batch, padded_batch = collator.lay(timed_examples()), padded.lay(timed_examples())
    of_rows = AttentionInUse.of(inner)
    ratios = []
    for _ in range(1 + _PAIRS):
        own_attention.give_back()
        padded_seconds = _step_seconds(model, padded_batch)
        of_rows.give_back()
        ratios.append(padded_seconds / _step_seconds(model, batch))
    return statistics.median(ratios[1:])  # the first pair warms up


def timed_examples() -> list[Example]:
    """Records with a shared prefix; the second half of each record's own tokens are targets."""
    draw = Random(5)
    trunk = tuple(draw.randrange(3, WORDS) for _ in range(_TIMED_TRUNK))
    examples = []
    for number in range(_TIMED_RECORDS):
        own = tuple(draw.randrange(3, WORDS) for _ in range(draw.choice(_TIMED_OWN)))
        learn = [0] * (len(trunk) + len(own) // 2) + [1] * (len(own) - len(own) // 2)
        examples.append(Example((*trunk, *own), tuple(learn), f"timed {number}"))
    return examples


def _step_seconds(model: Any, batch: Any) -> float:
    """Seconds of forward and backward for one batch."""
    start = time.perf_counter()
    nats, _ = target_nats(model, batch)
    nats.backward()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds


def _as_after_training(model: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            size = weight.shape[-1] ** -0.5 * (1.0 if "lora_A" in name else 0.2)
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * size)


def _noise(model: Any, examples: Sequence[Example], plain: Result) -> tuple[float, float, float]:
    """Difference of two plain runs. The delta rule amplifies rounding; in float64 Qwen3.5 agrees to 1e-12."""
    with another_plain_way(model):
        return _apart(one_at_a_time(model, examples), plain)


def _apart(ours: Result, plain: Result) -> tuple[float, float, float]:
    worst = 0.0
    for name, gradient in plain.gradients.items():
        difference = (ours.gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        worst = max(worst, difference.nan_to_num(nan=float("inf")).item())
    score = (ours.log_probabilities - plain.log_probabilities).abs().max().item()
    return abs(ours.loss - plain.loss) / plain.loss, score, worst


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block if it takes longer."""

    def stop(*_signal: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tried(family: str, values: Values, *, limit: int, trace: bool = False) -> Finding:
    """The finding for one family; a failure becomes a finding too."""
    if family not in transformers.CONFIG_MAPPING:
        return Finding(family, reason=f"not in transformers {transformers.__version__}")
    start = time.perf_counter()
    try:
        with _at_most(limit):
            finding = examine(family, values)
    except AtomtuneError as error:
        finding = Finding(family, reason=f"refused: {str(error).splitlines()[0]}")
    except ImportError as error:  # the package timm, which some towers need
        finding = Finding(family, reason=f"not in this environment: {str(error).strip().splitlines()[0]}")
    except Exception as error:  # noqa: BLE001  # any failure of a family belongs in the table
        if trace:
            traceback.print_exc()
        finding = Finding(family, reason=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:140]}")
    return Finding(**{**vars(finding), "seconds": time.perf_counter() - start})


Findings = Sequence[tuple[str, Finding]]  # (kind of layers, finding)


def page(findings: Findings, *, beside: tuple[str, list[Finding]] | None = None) -> str:
    """The text of docs/models.md.

    beside  another version of transformers, and the findings with it
    """
    here = [finding for _, finding in findings if finding.verdict != "not here"]
    exact = sum(finding.is_equal and finding.layout == "tree" for finding in here)
    padded = sum(finding.is_equal and finding.layout == "padded" for finding in here)
    timed = timed_examples()
    lines = [
        "# Families of models",
        "",
        f"Written by `python -m benchmarks.families --write` with transformers {transformers.__version__}, "
        f"torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}.",
        "Each family is a tiny model with random weights, in float32, with LoRA at the default settings. Nine records "
        "are arranged as `train` arranges them,",
        "and compared with plain transformers + PEFT, one record at a time.",
        "",
        "- *Apart*: the difference of the loss (relative), of the worst log-probability, and of the worst gradient of "
        "an adapter matrix (relative L2 norm).",
        "- *Noise*: the gradient's difference between two plain runs (another attention implementation, embeddings "
        "rounded differently).",
        f"- *Equal*: the loss differs by {_EQUAL_LOSS:.0e} or less and the gradient by {_EQUAL_GRADIENT:.0e} or less, "
        f"or by at most {_TIMES_NOISE:g} times the noise (gradients: {_MOST_GRADIENT:g} at most).",
        f"- *Speed*: forward and backward of {len(timed)} records after {_TIMED_TRUNK} shared tokens, as a tree "
        f"({len(graft(timed)):,} tokens) instead of padded rows ({padded_tokens(timed):,});",
        f"  the median of {_PAIRS} pairs on one CPU thread. These models are only {_SIZE['hidden_size']} wide, so "
        "everything but the matrix products weighs more than in a real model.",
        "  Part of the gain of mamba, falcon_mamba, jamba and zamba is our scan, one operation per token; "
        "transformers' needs about ten.",
        "",
        f"**{len(here)} families: {exact} share prefixes (layout tree) and are equal, {padded} are trained on padded "
        f"rows and are equal, {len(here) - exact - padded} fail.**",
        "",
        "| layers | family | class | layout | equal | apart | noise | speed | LoRA on, or why not |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(kind, finding) for kind, finding in findings if finding.verdict != "not here"]
    missing = [finding.family for _, finding in findings if finding.verdict == "not here"]
    if missing:
        lines += [
            "",
            f"Not in this version of transformers, or from a package that is not installed: {', '.join(missing)}.",
        ]
    lines += ["", *_left_out()]
    if beside:
        lines += ["", *_differences(findings, *beside)]
    return "\n".join(lines) + "\n"


def listed() -> set[str]:
    """The names that this transformers lists as models that write text; some also read images or sound."""
    return {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }


def without_a_row() -> set[str]:
    """Listed names that have no row in the table."""
    return listed() - {family for _, family, _ in families()}


def _left_out() -> list[str]:
    """Lines for the page: the names without a row, and why."""
    lines = [f"## Without a row, among the {len(listed())} names that transformers lists as models that write text", ""]
    rest = without_a_row()
    for reason, names in LEFT_OUT.items():
        here = [name for name in names.split() if name in rest]
        if here:
            lines.append(f"- {len(here)} {reason}: {', '.join(here)}.")
        rest = rest - set(here)
    if rest:
        lines.append(f"- {len(rest)} not tried yet: {', '.join(sorted(rest))}.")
    return lines


def _line(kind: str, finding: Finding) -> str:
    apart = " · ".join(f"{figure:.0e}" for figure in finding.apart or ())
    layout = f"{finding.layout}: {finding.reason}" if finding.apart and finding.reason else finding.layout
    last = finding.adapted if finding.apart else finding.reason.replace("|", "/")
    noise = f"{finding.noise[2]:.0e}" if finding.apart else ""
    speed = f"{finding.faster:.1f} ×" if finding.faster else ""
    cells = (kind, finding.family, finding.class_name, layout, finding.verdict, apart, noise, speed, last)
    return f"| {' | '.join(cells)} |"


def _differences(findings: Findings, version: str, others: Sequence[Finding]) -> list[str]:
    """Lines for the page: the differences with another version of transformers."""
    now = {finding.family: finding for _, finding in findings}
    not_here = [other for other in others if other.verdict == "not here"]
    absent = [other.family for other in not_here if other.reason.startswith("not in transformers")]
    without_package = {other.family for other in not_here} - set(absent)
    lines = [f"## With transformers {version}", ""]
    lines.append("`python -m benchmarks.families --json FILE` with that version, then `--beside FILE` with this one.")
    exact = sum(other.is_equal and other.layout == "tree" for other in others)
    padded = sum(other.is_equal and other.layout == "padded" for other in others)
    here = len(others) - len(not_here)
    lines.append(
        f"{here} of these families: {exact} share prefixes and are equal, {padded} are trained on padded rows "
        "and are equal."
    )
    if absent:
        lines.append(f"Not in that version: {', '.join(absent)}.")
    if untried := sorted(without_package | now.keys() - {other.family for other in others}):
        lines.append(f"Not tried with that version: {', '.join(untried)}.")
    differ = []
    for other in others:
        this = now[other.family]
        if other.verdict == "not here" or (other.verdict, other.layout) == (this.verdict, this.layout):
            continue
        differ.append(f"- {other.family}: {other.layout or 'fails'}, {other.verdict}. {other.reason}".rstrip())
    return [
        *lines,
        *(
            ["", "Different from the table above:", "", *differ]
            if differ
            else ["All others are as in the table above."]
        ),
    ]


def _saved(findings: Findings) -> str:
    of_families = [vars(finding) for _, finding in findings]
    return json.dumps({"transformers": transformers.__version__, "findings": of_families}, indent=1)


def _read(file: Path) -> tuple[str, list[Finding]]:
    saved = json.loads(file.read_text(encoding="utf-8"))
    return saved["transformers"], [Finding(**finding) for finding in saved["findings"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--json", type=Path, help="write what was found to this file too")
    parser.add_argument("--beside", type=Path, help="such a file of another transformers: what is otherwise there")
    parser.add_argument("--trace", action="store_true", help="print the traceback of what fails")
    parser.add_argument("--seconds", type=int, default=300, help="limit for each family")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    quiet_libraries()
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    findings = []
    for kind, family, values in families():
        if chosen.families and family not in chosen.families:
            continue
        finding = tried(family, values, limit=chosen.seconds, trace=chosen.trace)
        apart = " ".join(f"{figure:.0e}" for figure in finding.apart or ())
        start = f"{family:18} {finding.layout:7} {finding.verdict:8} {apart:18} noise {finding.noise[2]:.0e}"
        speed = f"{finding.faster:.1f} ×" if finding.faster else ""
        print(f"{start} {speed:7} {finding.seconds:4.1f} s  {finding.reason}", flush=True)
        findings.append((kind, finding))
    text = page(findings, beside=_read(chosen.beside) if chosen.beside else None)
    print(text.split("**")[1])
    if chosen.json:
        chosen.json.write_text(_saved(findings), encoding="utf-8")
    if chosen.write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
