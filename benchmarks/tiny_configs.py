"""Tiny configs: the values of a tiny model of each family that `families.py` examines, and the families left out."""

from collections.abc import Iterator
from typing import Any

import transformers

from benchmarks import checkpoints
from benchmarks.checkpoints import rope

#: Tokens of every tiny vocabulary.
WORDS = 512

Values = dict[str, Any]
_TOKENS: Values = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZE: Values = {
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

#: kind of layers → family → config values beyond SIZE (None in place of SIZE: all values are given)
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
    **SIZE,
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
_ROPE: Values = rope(3, 3, 2)
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

_THREE_POSITIONS: Values = {"rope_parameters": rope(2, 3, 3)}
_HALF_TURNED: Values = {"rope_parameters": rope(1, 1, 2, partial_rotary_factor=0.5)}
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


def families() -> Iterator[tuple[str, str, Values]]:
    """Kind of layers, family, and the values of its config."""
    for kind, of_kind in FAMILIES.items():
        for family, values in of_kind.items():
            yield kind, family, {**SIZE, **values}
    for family, (text, tower) in VISION_LANGUAGE.items():
        yield "images and text, tuned on text", family, {"text_config": {**SIZE, **text}, "vision_config": tower}
    for family in checkpoints.FAMILIES:
        yield "whole checkpoints, tuned on text", family, checkpoints.values_of(family, _text_values)
    for family in sorted({*_OF_ANY.split(), *_BEYOND_ANY}):
        yield "more", family, _text_values(family)
    for family, values in sorted(_DECODERS.items()):
        what_it_is = {name: value for name, value in values.items() if name.startswith("is_")}
        yield "decoders", family, {**_known(family), **_known(family, values), **what_it_is}


def _text_values(family: str) -> Values:
    """The values of a family of text models."""
    for of_kind in FAMILIES.values():
        if family in of_kind:
            return {**SIZE, **of_kind[family]}
    return {**_known(family), **_BEYOND_ANY.get(family, {})}


def _known(family: str, of: Values = _ANY) -> Values:
    """Those of some values that a family's config has."""
    if family not in transformers.CONFIG_MAPPING:
        return {}
    config = transformers.CONFIG_MAPPING[family]()
    names = {*config.to_dict(), *config.attribute_map}
    return {name: value for name, value in of.items() if name in names}
