"""Checkpoints: tiny whole checkpoints with towers for images or sound, made from each family's default config.

A tower is built but never run, so its config keeps the family's values except for numbers of layers and widths. The
text part gets the values of its own family (tiny_configs.py). The tables below hold the exceptions.
"""

from collections.abc import Callable
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

Values = dict[str, Any]

_LAYERS = {
    *("num_hidden_layers", "num_layers", "n_layers", "depth", "encoder_layers", "decoder_layers"),
    *("num_encoder_layers", "num_decoder_layers"),
}
_WIDTHS: Values = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "embed_dim": 32,
    "projection_dim": 64,
    "out_hidden_size": 64,
    "head_dim": 16,
}


def rope(*sections: int, **more: Any) -> Values:
    """Rotary positions in sections: time, height, width. For text all three are equal."""
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(sections), **more}


def _rope(*sections: int, **more: Any) -> Values:
    return {"text_config": {"rope_parameters": rope(*sections, **more)}}


def _timm(architecture: str, **more: Any) -> Values:
    """One of the smallest towers of the package timm."""
    return {"vision_config": {"architecture": architecture, **more}}


_HALF_TURNED = _rope(1, 1, 2, partial_rotary_factor=0.5)
_ONE_IMAGE_TOKEN: Values = {"vocabulary_map": {"<image>": 9}}
_SMALL_DEPTHS: Values = {"num_filters": 4, "depths": 7 * [1]}
#: Families that _made_small alone makes small.
_BY_RULE = """
aria aya_vision cohere2_vision cohere_compass cosmos3_omni deepseek_vl deepseek_vl_hybrid exaone4_5 fuyu gemma4
gemma4_unified git glmasr got_ocr2 granite_docling granite_speech granite_speech_plus hyperclovax_vision_v2 idefics2
idefics3 inkling_mm_model janus kimi_k25 kosmos-2.5 lfm3_vl lighton_ocr llava_next llava_next_video llava_onevision
minicpm_ocr minicpmv4_6 minicpmv4_7 minimax_m3_vl mllama moshi moss_transcribe_diarize muse_glimmer omniasr ovis2
phi4_multimodal pp_chart2table qianfan_ocr qwen2_audio qwen3_5 qwen3_5_moe qwen3_asr qwen4_exp video_llama_3
video_llava vipllava voxtral
"""
#: family → values beyond _made_small
_BEYOND_RULE: dict[str, Values] = {
    "apertus1p5": {
        "image_token_id": 9,
        "audio_token_id": 10,
        "image_token_offset": 136,
        "audio_token_offset": 200,
        "vision_config": {"embed_dim": 256, "base_channels": 32, "codebook_size": 64},
        "audio_config": {
            "codebook_size": 64,
            "codebook_dim": 32,
            "decoder_hidden_size": 32,
            "decoder_intermediate_size": 48,
            "decoder_num_layers": 1,
        },
    },
    "chameleon": {**_ONE_IMAGE_TOKEN, "vq_config": {"base_channels": 32, "embed_dim": 256, "num_embeddings": 64}},
    "cosmos3_edge": _rope(3, 3, 2),
    "deepseek_ocr2": {
        "text_config": {
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "sparse"],
        },
        "vision_config": {"encoder_config": {"head_dim": 16}, "sam_config": {"global_attn_indexes": [0]}},
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 32, "adapter_output_size": 64},
    },
    "emu3": {**_ONE_IMAGE_TOKEN, "vq_config": {"base_channels": 32, "embed_dim": 4, "codebook_size": 64}},
    "ernie4_5_vl_moe": {"text_config": {**_rope(3, 3, 2)["text_config"], "moe_intermediate_size": [32, 32]}},
    "fast_vlm": _timm("mobilenetv3_small_050"),
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16}},
    "gemma3n": _timm("mobilenetv3_small_050", hidden_size=1024),
    "glm46v": _HALF_TURNED,
    "glm5_next": {
        "text_config": {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "head_dim": 0,
            "qk_rope_head_dim": 0,
            "index_topk": 16,
            "index_head_dim": 16,
            "index_n_heads": 64,
            "index_kpool": 4,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "hc_mult": 2,
        },
    },
    "glm_ocr": _rope(3, 3, 2),
    "glmga": _HALF_TURNED,
    "granite4_vision": {
        "text_config": {"model_type": "granite"},  # 5.17 has another default, but its code reads Granite's scales
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [1],
        "vision_feature_layer": -1,
        "vision_config": {"hidden_size": 128},
        "qformer_config": {
            "num_attention_heads": 2,
            "hidden_size": 128,
            "encoder_hidden_size": 32,
            "intermediate_size": 48,
        },
    },
    "hunyuan_vl": {**_rope(2, 2, 2, 2), "vision_config": {"text_hidden_size": 64}},
    "hy_v4_vl": _rope(2, 1, 1),
    "inkling2": {"vision_config": {"text_hidden_size": 64}, "audio_config": {"text_hidden_size": 64}},
    "inkling2_loop": {"vision_config": {"text_hidden_size": 64}, "audio_config": {"text_hidden_size": 64}},
    "mistral_large4": {"text_config": {"num_key_value_heads": 4}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0]}},
    "muse_spark": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "layer_rope_theta": [10_000.0, 0],
            "moe_hidden_size": 64,
            "num_local_experts": 4,
        },
        "audio_config": {"patch_sizes": [16], "hidden_sizes": [32], "depths": [1], "num_hidden_layers": 1},
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": _rope(3, 3, 2),
    "perception_lm": _timm(
        "vit_tiny_patch16_224", hidden_size=192, model_args={"embed_dim": 192, "img_size": [32, 32]}
    ),
    "qwen2_5_omni_thinker": {**_rope(3, 3, 2), "vision_start_token_id": 5},
    "qwen3_omni_moe_thinker": {**_rope(3, 3, 2), "vision_start_token_id": 5},
    "step3p7": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "unlimited_ocr": {"text_config": {"num_key_value_heads": 4}},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": _SMALL_DEPTHS,
        "semantic_tokenizer_encoder_config": _SMALL_DEPTHS,
    },
}
FAMILIES = sorted({*_BY_RULE.split(), *_BEYOND_RULE})


def values_of(family: str, text_values: Callable[[str], Values]) -> Values:
    """The config values of a tiny whole checkpoint; empty if this transformers does not know the family.

    text_values  gives the values of a family of text models by its name
    """
    if family not in transformers.CONFIG_MAPPING:
        return {}
    config = transformers.CONFIG_MAPPING[family]()
    text = config.get_text_config()
    values = _made_small(config.to_dict())
    if text is config:
        values |= text_values(family)
    for name in config.sub_configs:
        if getattr(config, name, None) is text:
            values[name] = {"model_type": text.model_type, **text_values(text.model_type)}
    del values["model_type"]
    return {**_merged(values, _BEYOND_RULE.get(family, {})), "architectures": [class_of(family)]}


def class_of(family: str) -> str:
    """The model class that a published checkpoint of this family names."""
    for classes in (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ):
        if name := classes.get(family):
            return name if isinstance(name, str) else name[0]
    raise KeyError(family)


def _made_small(config: Values) -> Values:
    values: Values = {"model_type": config["model_type"]} if "model_type" in config else {}
    for name, value in config.items():
        if isinstance(value, dict) and ("model_type" in value or name.endswith("_config")):
            values[name] = _made_small(value)
        elif isinstance(value, int) and name in _LAYERS:
            values[name] = 1
        elif isinstance(value, int) and name in _WIDTHS:
            values[name] = _WIDTHS[name]
    return values


def _merged(values: Values, beyond: Values) -> Values:
    merged = dict(values)
    for name, value in beyond.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both else value
    return merged
