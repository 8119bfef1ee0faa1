"""Tiny vision-language checkpoints with random weights and a tokenizer, with the files of a published one."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from tests.hybrids import DELTA_NET
from tests.tiny import CHATML, SIZE, tokenizer_of

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "image_size": 28,
    "patch_size": 14,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    # Qwen's names for the same values
    "num_heads": 2,
    "depth": 2,
    "out_hidden_size": 32,
}
_HEAD = {"head_dim": 8}
#: family → config values of the text part, of the vision tower, and of the whole
CHECKPOINTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen3_5": ({**DELTA_NET, **_HEAD, "tie_word_embeddings": False}, {}, {}),
    "gemma3": (
        {**_HEAD, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        {},
        {"mm_tokens_per_image": 1},
    ),
    "mistral3": (_HEAD, {"head_dim": 16}, {}),
}


def config_of(family: str, *, vocabulary: int, **special: Any) -> Any:
    """The config of the whole checkpoint."""
    text, vision, whole = CHECKPOINTS[family]
    config = AutoConfig.for_model(family)
    words = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **special}
    text_config = type(config.text_config)(**{**SIZE, **text, **words})
    vision_config = type(config.vision_config)(**{**_VISION, **vision})
    return type(config)(text_config=text_config.to_dict(), vision_config=vision_config.to_dict(), **whole)


#: family → its tokens for images, by the processor's name and by the config's
_IMAGE_TOKENS = {
    "gemma3": {
        "image_token": ("<image_soft_token>", "image_token_index"),
        "boi_token": ("<start_of_image>", "boi_token_index"),
        "eoi_token": ("<end_of_image>", "eoi_token_index"),
    },
    "qwen3_5": {
        "image_token": ("<|image_pad|>", "image_token_id"),
        "video_token": ("<|video_pad|>", "video_token_id"),
        "vision_start_token": ("<|vision_start|>", "vision_start_token_id"),
        "vision_end_token": ("<|vision_end|>", "vision_end_token_id"),
    },
    "mistral3": {
        "image_token": ("[IMG]", "image_token_index"),
        "image_break_token": ("[IMG_BREAK]", None),
        "image_end_token": ("[IMG_END]", None),
    },
}
#: Sizes that vLLM's linear attention needs on a CPU, besides bfloat16.
_LINEAR_HEAD = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}


def write_servable(family: str, folder: Path, *, head_dim: int) -> Path:
    """A checkpoint with an image processor and published weight names, which vLLM needs to start."""
    tokens = _IMAGE_TOKENS[family]
    images = {name: token for name, (token, _) in tokens.items()}
    tokenizer = tokenizer_of("bytes", CHATML)
    tokenizer.add_special_tokens({"extra_special_tokens": list(images.values())})
    tokenizer.add_tokens(["\n" * count for count in range(1, 5)])  # Gemma's processor looks for them
    tokenizer.save_pretrained(folder)
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    settings_file.write_text(json.dumps({**settings, "extra_special_tokens": images}), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heads = {"head_dim": head_dim, **(_LINEAR_HEAD if family == "qwen3_5" else {})}
    config = config_of(family, vocabulary=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **heads)
    for token, field in tokens.values():
        if field:
            setattr(config, field, tokenizer.convert_tokens_to_ids(token))
    torch.manual_seed(7)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    if family == "gemma3":
        file = folder / "model.safetensors"
        weights = {
            name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in load_file(file).items()
        }
        save_file(weights, file, metadata={"format": "pt"})
    _processor(family, tokenizer, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _processor(family: str, tokenizer: Any, config: Any) -> Any:
    """A processor for images of 28 pixels in patches of 14; importing it needs torchvision."""
    from transformers import (
        Gemma3ImageProcessor,
        Gemma3Processor,
        PixtralImageProcessor,
        PixtralProcessor,
        Qwen2VLImageProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    if family == "gemma3":
        images = Gemma3ImageProcessor(size={"height": 28, "width": 28}, image_seq_length=1)
        return Gemma3Processor(images, tokenizer, image_seq_length=1)
    if family == "qwen3_5":
        return Qwen3VLProcessor(Qwen2VLImageProcessor(patch_size=14), tokenizer, Qwen3VLVideoProcessor(patch_size=14))
    images = PixtralImageProcessor(size={"longest_edge": 28}, patch_size={"height": 14, "width": 14})
    return PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=config.spatial_merge_size)


def write_checkpoint(family: str, folder: Path) -> Path:
    """A checkpoint in float32; Qwen3.5's also has a layer that its class does not load (mtp)."""
    tokenizer = tokenizer_of("bytes", CHATML)
    tokenizer.save_pretrained(folder)
    config = config_of(family, vocabulary=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(7)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}\n', encoding="utf-8")
    if family == "qwen3_5":
        file = folder / "model.safetensors"
        more = {"mtp.fc.weight": torch.randn(4, 8), "mtp.norm.weight": torch.ones(8, dtype=torch.bfloat16)}
        save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    return folder
