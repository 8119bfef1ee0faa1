"""Auto class: the class that a config names is loaded."""

import pytest
from transformers import AutoConfig

from atomtune.model.auto_class import auto_class

NAMED = {
    ("qwen3_5", "Qwen3_5ForConditionalGeneration"): "AutoModelForImageTextToText",
    ("qwen3_5", "Qwen3_5ForCausalLM"): "AutoModelForCausalLM",
    ("qwen3_5_text", "Qwen3_5ForCausalLM"): "AutoModelForCausalLM",
    ("gemma3", "Gemma3ForConditionalGeneration"): "AutoModelForCausalLM",  # its mapping has the whole class
    ("mistral3", "Mistral3ForConditionalGeneration"): "AutoModelForImageTextToText",
    ("llama", "LlamaForCausalLM"): "AutoModelForCausalLM",
    ("llama", "LlamaModel"): "AutoModelForCausalLM",  # some base models name their class without a head
    ("t5", "T5ForConditionalGeneration"): "AutoModelForCausalLM",  # it refuses T5, which is not a decoder
}


@pytest.mark.parametrize(("family", "named"), NAMED)
def test_the_auto_class_is_the_one_that_loads_the_configs_class(family, named):
    config = AutoConfig.for_model(family, architectures=[named])
    assert auto_class(config).__name__ == NAMED[family, named]


def test_the_auto_map_of_remote_code_decides_the_auto_class():
    config = AutoConfig.for_model("t5", architectures=["Foreign"], auto_map={"AutoModelForImageTextToText": "a.B"})
    assert auto_class(config).__name__ == "AutoModelForImageTextToText"
