"""JSON files beside the weights: an error names the file, what was found and what was expected."""

import json
import os

import pytest

from atomtune.errors import BadModel
from atomtune.language import in_chinese
from atomtune.model.adapter_folder import METADATA, AdapterMetadata
from atomtune.model.file_schemas import AdapterConfig, GenerationConfig, ModelConfig
from atomtune.model.fingerprint import fingerprint
from atomtune.model.json_files import checked, refuse_no_files


def refused(tmp_path, content: str, shape=ModelConfig) -> str:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(BadModel) as raised:
        checked(file, shape)
    assert str(file) in str(raised.value)
    return str(raised.value)


def test_every_problem_is_reported_with_found_and_expected_values(tmp_path):
    values = {"hidden_size": "32", "num_hidden_layers": 10**9, "tie_word_embeddings": 1, "layer_types": {"0": "full"}}
    told = refused(tmp_path, json.dumps({**values, "text_config": {"vocab_size": -3}}))
    assert 'hidden_size: found "32", expected a whole number' in told
    assert "num_hidden_layers: found 1000000000, expected 10000 or less" in told
    assert "tie_word_embeddings: found 1, expected true or false" in told
    assert "layer_types: found an object of 1, expected a list" in told
    assert "text_config.vocab_size: found -3, expected 1 or more" in told


def test_a_wrong_value_of_a_union_type_is_not_reported_repeatedly(tmp_path):
    told = refused(tmp_path, '{"eos_token_id": [1, "x"]}', GenerationConfig)
    assert told.count("eos_token_id") == 2, told  # the list is not a number, and neither is its second item
    assert 'eos_token_id[1]: found "x", expected a whole number' in told


def test_a_file_that_is_not_a_json_object_is_refused_with_the_reason(tmp_path):
    assert "is empty" in refused(tmp_path, "")
    assert "nested too deeply" in refused(tmp_path, "[" * 200_000)
    assert "not an object" in refused(tmp_path, "[]")
    assert "line 1, column 2: a key in double quotes is expected here" in refused(tmp_path, "{")
    assert "bytes; such a file may have" in refused(tmp_path, '{"x": "' + "a" * 2**24 + '"}')


def test_json_syntax_errors_are_also_reported_in_chinese(tmp_path):
    # Once, the message quoted Python: "Expecting ',' delimiter: line 2 column 1".
    told = in_chinese(refused(tmp_path, '{"hidden_size": 32\n"vocab_size": 8}'))
    assert "第 2 行第 1 列不是 JSON：这里应为逗号或右括号" in told


def test_a_wrong_value_that_contains_a_brace_is_reported(tmp_path):
    # Found by ten thousand alterations: a message that contained "{" was read as a template.
    values = {"template": "atom", "instruction_role": "system", "stop": "</s>", "template_date": "{"}
    (tmp_path / METADATA).write_text(json.dumps(values))
    with pytest.raises(BadModel, match="template_date: found"):
        AdapterMetadata.load(tmp_path)


def test_an_empty_init_lora_weights_is_refused(tmp_path):
    # Found by ten thousand alterations: "" was accepted as false.
    told = refused(tmp_path, '{"peft_type": "LORA", "init_lora_weights": ""}', AdapterConfig)
    assert 'init_lora_weights: found "", expected true or false or a name' in told
    (tmp_path / "config.json").write_text('{"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}')
    checked(tmp_path / "config.json", AdapterConfig)


def test_unusual_values_of_published_configs_are_accepted(tmp_path):
    # Falcon-H1 has an infinite limit, OpenELM a width per layer, and some tokenizers have -1 as padding token.
    values = {"time_step_limit": [0.0, float("inf")], "num_key_value_heads": [3, 4], "pad_token_id": -1}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**values, "rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 4}}))
    checked(file, ModelConfig)


def test_an_unreadable_weight_file_is_reported(tmp_path, monkeypatch):
    # safetensors reports a missing file, and merge then ended in a traceback.
    (tmp_path / "model.safetensors").write_bytes(b"x")
    refuse_no_files(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read everything
    with pytest.raises(BadModel, match="cannot be read by this user"):
        fingerprint(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes of this kind")
def test_a_named_pipe_in_place_of_weights_is_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(BadModel, match="a pipe or a device"):
        fingerprint(str(tmp_path))
