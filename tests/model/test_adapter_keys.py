"""Adapter keys: a layer has one place in another class, or is refused; towers are not part of the text model."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from atomtune.errors import BadModel
from atomtune.model.adapter_keys import module_of, names_in, new_names, text_modules
from tests.vision_language import CHECKPOINTS, config_of

NAME = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


def test_a_layer_with_no_match_or_two_matches_is_refused():
    with pytest.raises(BadModel, match="0 places"):
        new_names([NAME], ["model.layers.0.attn.q_proj"])
    with pytest.raises(BadModel, match="2 places"):
        new_names([NAME], ["model.a.layers.0.mlp.up_proj", "model.b.layers.0.mlp.up_proj"])


def test_a_tensor_of_a_layer_that_peft_wraps_twice_maps_to_that_layer():
    assert module_of(NAME) == "model.layers.0.mlp.up_proj"
    twice = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    assert module_of(twice) == "model.layers.0.mlp.experts"
    assert new_names([twice], ["model.text.layers.0.mlp.experts"]) == {twice: twice.replace(".layers", ".text.layers")}


def test_trained_token_rows_map_to_their_embedding():
    # Otherwise an adapter with such rows is refused, because no class has a layer of that name.
    assert module_of("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta") == "model.embed_tokens"


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_text_class_names_map_to_the_checkpoints_language_model(family):
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config_of(family, vocabulary=300))
    modules = text_modules(whole)
    assert "lm_head" in modules
    assert all(name == "lm_head" or name.startswith("model.language_model") for name in modules)
    assert names_in(whole, [NAME]) == {NAME: NAME.replace(".layers", ".language_model.layers")}
    own = names_in(whole, [NAME])[NAME]
    assert names_in(whole, [own]) == {own: own}


def test_names_of_another_model_stay_as_they_are():
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(AutoConfig.for_model("gemma3"))
    assert names_in(base, ["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"]) == {
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": (
            "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
        )
    }
