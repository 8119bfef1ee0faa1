"""Folders that cannot be a base: each kind gets its own message, before any training."""

import json
import os
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BlipConfig,
    GemmaConfig,
    LlamaConfig,
    PaliGemmaConfig,
    SiglipVisionConfig,
    T5Config,
    ViTConfig,
    VoxtralConfig,
    WhisperConfig,
    XLNetConfig,
)

from atomtune.choices import SHORTEST_RECORD
from atomtune.cli import main
from atomtune.errors import BadModel
from atomtune.model.base_checks import check_base_folder, refuse_not_causal
from atomtune.model.base_shape import base_shape, positions_of
from atomtune.model.load import BaseSpec, load_base, load_tokenizer, read_config
from tests.tiny import FAMILIES

CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def train(base, data, out) -> list[str]:
    command = ["train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(out)]
    return [*command, "--max_steps", "1"]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "baichuan_like"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_causal_models_pass(models, family, dtype):
    load_base(BaseSpec(path=str(models(family)), dtype=dtype, device=CPU))


def test_a_model_that_sees_later_tokens_is_refused(models, dialogues, tmp_path, capsys):
    folder = tmp_path / "bert"
    shutil.copytree(models("llama"), folder)
    (folder / "model.safetensors").unlink()
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    AutoModelForCausalLM.from_config(BertConfig(vocab_size=vocabulary, **SMALL)).save_pretrained(folder)
    assert main(train(folder, dialogues, tmp_path / "out")) == 2
    assert "is not a causal model: later tokens change its predictions for earlier ones" in capsys.readouterr().err


def test_a_model_that_reads_its_prompt_in_both_directions_is_refused():
    # PaliGemma: in a text without an image, all tokens belong to the prompt.
    text = GemmaConfig(vocab_size=100, head_dim=8, initializer_range=0.2, num_key_value_heads=2, **SMALL)
    vision = SiglipVisionConfig(image_size=28, patch_size=14, **SMALL)
    parts = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    config = PaliGemmaConfig(**parts, image_token_id=99, projection_dim=32)
    torch.manual_seed(0)
    with pytest.raises(BadModel, match="is not a causal model"):
        refuse_not_causal("x", AutoModelForImageTextToText.from_config(config))


def test_look_ahead_is_detected_in_a_model_with_time_first_tensors():
    # XLNet embeds [T, B]; the check once looked for a gradient along the wrong axis and found none.
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(XLNetConfig(vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=64))
    with pytest.raises(BadModel, match="is not a causal model"):
        refuse_not_causal("x", model)


def test_a_bert_configured_as_a_decoder_is_not_refused():
    config = BertConfig(vocab_size=100, is_decoder=True, **SMALL)
    torch.manual_seed(0)
    refuse_not_causal("x", AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (T5Config(), "t5 is an encoder-decoder"),
        (WhisperConfig(), "whisper is an encoder-decoder"),
        (ViTConfig(), "vit is of another kind"),
    ],
    ids=["t5", "whisper", "vit"],
)
def test_encoder_decoder_and_vision_models_are_refused_by_kind(tmp_path, config, sentence):
    config.save_pretrained(tmp_path)
    with pytest.raises(BadModel, match=sentence):
        read_config(str(tmp_path))


def test_a_class_without_a_forward_is_refused_naming_its_usable_part(tmp_path):
    # Once, all 60 GB of Qwen3-Omni were loaded, and `plan` ended in a traceback.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_omni_moe"}))
    with pytest.raises(BadModel, match=r"no forward(.|\n)*Its part Qwen3OmniMoeThinkerForConditionalGeneration can"):
        read_config(str(tmp_path))


def test_an_audio_language_model_is_not_refused_as_encoder_decoder(tmp_path):
    # transformers lists Voxtral, Qwen2-Audio and eight others next to T5, but their prompts contain the sound.
    VoxtralConfig().save_pretrained(tmp_path)
    assert read_config(str(tmp_path)).model_type == "voxtral"


def test_a_model_that_needs_an_image_is_refused_with_that_reason(tmp_path, models):
    parts = {name: {**SMALL, "vocab_size": 100, "projection_dim": 32} for name in ("text_config", "vision_config")}
    model = AutoModelForImageTextToText.from_config(BlipConfig(**parts))
    with pytest.raises(BadModel, match=r"BlipFor\w+ cannot compute a text alone.*\n.*missing.*'pixel_values'"):
        refuse_not_causal(str(models("llama")), model)


def test_a_failure_inside_transformers_is_reported_as_such(models, monkeypatch):
    # Llama 4's whole class asks its text part's output for images; neither its files nor the text are wrong.
    model = load_base(BaseSpec(path=str(models("llama")), dtype=torch.float32, device=CPU))
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **named: forward(*args, **named).image_outputs)
    with pytest.raises(BadModel, match=r"LlamaForCausalLM fails on a text in the code of transformers .*image_out"):
        refuse_not_causal(str(models("llama")), model)


def test_a_model_without_an_embedding_table_is_refused_with_the_reason(models, monkeypatch):
    # Kyutai's models take 33 numbers per token; for a hub name, the message did not say what failed.
    model = load_base(BaseSpec(path=str(models("llama")), dtype=torch.float32, device=CPU))
    monkeypatch.setattr(model, "get_input_embeddings", torch.nn.Identity)
    for path in (str(models("llama")), "owner/name"):
        with pytest.raises(BadModel, match=r"LlamaForCausalLM cannot compute a text alone.*\n.*'weight'"):
            refuse_not_causal(path, model)


def test_a_head_dim_of_zero_is_accepted_and_a_negative_one_refused(models, tmp_path):
    # GLM-5 Next's config has head_dim 0.
    config = json.loads((models("llama") / "config.json").read_text())
    for width in (0, -1):
        (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": {"head_dim": width}}))
        if width < 0:
            with pytest.raises(BadModel, match="head_dim: found -1"):
                check_base_folder(tmp_path)
        else:
            check_base_folder(tmp_path)


def test_unlimited_positions_are_not_taken_for_too_few(tmp_path):
    config = XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=64)
    assert config.max_position_embeddings == -1
    config.save_pretrained(tmp_path)
    assert base_shape(str(tmp_path)).longest > SHORTEST_RECORD
    assert positions_of(config) is None


def test_an_adapter_or_a_checkpoint_as_the_base_model_is_refused(models, by_heart, dialogues, tmp_path, capsys):
    checkpoint = next(by_heart.glob("checkpoint-*"))
    for folder, kind in ((by_heart, "is an adapter, not a base model"), (checkpoint, "is a checkpoint of a run")):
        assert main(train(folder, dialogues, tmp_path / "out")) == 2
        told = capsys.readouterr().err
        assert kind in told
        assert f"It was trained on {models('llama')}" in told
    assert not (tmp_path / "out").exists()


def test_a_gguf_and_a_git_lfs_pointer_are_refused_by_kind(models, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadModel, match="a GGUF file"):
        read_config(str(tmp_path))
    folder = tmp_path / "clone"
    shutil.copytree(models("llama"), folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "config.json").write_text(pointer)
    with pytest.raises(BadModel, match=r"config\.json is a git-lfs pointer"):
        read_config(str(folder))


def test_a_model_whose_numbers_are_not_finite_is_refused(models):
    model = load_base(BaseSpec(path=str(models("llama")), dtype=torch.float32, device=CPU))
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(BadModel, match="not finite"):
        refuse_not_causal("x", model)


def test_a_deep_model_with_a_zero_embedding_row_passes_as_causal():
    # As in rows of padding: each norm multiplied the gradient by a thousand, and NaN counted as a look ahead.
    deep = {**SMALL, "num_hidden_layers": 24, "initializer_range": 0.3}
    config = LlamaConfig(vocab_size=100, rms_norm_eps=1e-6, **deep)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
    refuse_not_causal("x", model)


@pytest.mark.parametrize("name", ["chat_template.jinja", "model.safetensors", "generation_config.json", "vocab.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a link to nothing"])
def test_a_pipe_or_broken_link_in_place_of_a_model_file_is_refused(models, tmp_path, name, kind):
    # A pipe in place of weights was read forever; for a template that is a broken link, another was used silently.
    folder = tmp_path / "base"
    shutil.copytree(models("llama"), folder)
    (folder / name).unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("blobs/0123")
    for read in (read_config, load_tokenizer):
        with pytest.raises(BadModel, match=rf"{name} is a .*, not a file"):
            read(str(folder))


def test_a_config_with_a_huge_count_is_refused_before_it_is_built(models, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(models("llama"), folder)
    for name in ("num_labels", "num_mtp_layers"):
        config = json.loads((models("llama") / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, name: 10**9}))
        with pytest.raises(BadModel, match=f"{name}: found 1000000000, expected [0-9]+ or less"):
            read_config(str(folder))
