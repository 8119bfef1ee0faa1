"""Answers end where training taught them to, whatever the base's generation config says."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from atomtune.cli import main
from atomtune.data.encoding.choose_template import load_template
from atomtune.errors import BadModel
from atomtune.model.adapter import LoraSpec, new_adapter
from atomtune.model.generate import answer_ids, prompt_ids, ready_to_answer, stop_ids, stop_ids_on
from atomtune.model.load import BaseSpec, load_base, load_tokenizer

CPU = torch.device("cpu")
#: As in published bases: each would suppress the stop token (id 2), or contradict itself.
CONFIGS = {
    "minimum": {"min_new_tokens": 50, "eos_token_id": 2},
    "forced": {"forced_bos_token_id": 5, "suppress_tokens": [2], "eos_token_id": 2},
    "clash": {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "bos_token_id": 1},
}


def loaded(models, config):
    base = load_base(BaseSpec(path=str(models("llama")), dtype=torch.float32, device=CPU))
    base.generation_config = GenerationConfig(**config)
    return base, load_template("auto", load_tokenizer(str(models("llama"))))


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_that_prevent_stopping_are_dropped_with_a_notice(models, name):
    model, template = loaded(models, CONFIGS[name])
    notices: list[str] = []
    ready_to_answer(model, template, notice=notices.append)
    config = model.generation_config
    assert len(notices) == 1
    for setting in CONFIGS[name].keys() - {"eos_token_id", "bos_token_id", "do_sample"}:
        assert getattr(config, setting) is None
        assert setting in notices[0]
    config.validate(strict=True)  # otherwise transformers would not save it


def test_sampling_settings_are_kept_if_the_base_samples(models):
    model, template = loaded(models, {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "eos_token_id": 2})
    notices: list[str] = []
    ready_to_answer(model, template, notice=notices.append)
    assert (model.generation_config.temperature, model.generation_config.top_p) == (0.7, 0.8)
    assert not notices


def test_stop_ids_include_the_bases_and_the_trained_stop_token(models):
    # Llama 3.1 has three stop tokens; with only one of them, tool calls would not stop.
    model, template = loaded(models, {"eos_token_id": [7, 8, 9]})
    assert stop_ids(model, template) == [2, 7, 8, 9]


def test_the_stop_ids_of_a_base_with_code_of_its_own_are_those_of_the_loaded_model(models, tmp_path):
    """Without generation_config.json: `serve --trust_remote_code` ended in a traceback after its certificate."""
    path = str(shutil.copytree(models("baichuan_like"), tmp_path / "base"))
    (tmp_path / "base" / "generation_config.json").unlink(missing_ok=True)
    template = load_template("auto", load_tokenizer(path, trust_remote_code=True))
    model = load_base(BaseSpec(path=path, dtype=torch.float32, device=CPU, trust_remote_code=True))
    stops = stop_ids(model, template)
    assert stops and stop_ids_on(path, template, trust_remote_code=True) == stops
    with pytest.raises(BadModel, match="--trust_remote_code"):
        stop_ids_on(path, template)


@pytest.mark.parametrize(
    "config",
    [
        {"num_beams": 4},
        {"penalty_alpha": 0.6, "top_k": 4, "do_sample": True},
        {"dola_layers": "high"},
        {"force_words_ids": [[1]]},
        {"stop_strings": ["x"]},
        {"token_healing": True},
        {"return_dict_in_generate": True, "output_scores": True},
        {"sequence_bias": {"x": 1}},
        {"bad_words_ids": [[10**6]]},
        {"cache_implementation": "quantized"},
        {"exponential_decay_length_penalty": [1, "x"]},
        {"prompt_lookup_num_tokens": 10**9},
        {"guidance_scale": 2.0},
    ],
    ids=str,
)
def test_unsupported_decoding_settings_are_ignored_with_a_notice(models, config):
    # Each of these ended a chat in a traceback, downloaded a program from the hub, or gave another answer.
    model, template = loaded(models, config)
    notices: list[str] = []
    ready_to_answer(model, template, notice=notices.append)
    assert len(answer_ids(model, template, [{"role": "user", "content": "x"}], max_new_tokens=3)) == 3
    assert next(iter(config)) in notices[0]


def test_a_generation_config_that_lists_defaults_gives_no_notice(models):
    full = {"num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1, "diversity_penalty": 0.0}
    full |= {"length_penalty": 1.0, "early_stopping": False, "output_scores": False, "num_assistant_tokens": 20}
    model, template = loaded(models, full)
    notices: list[str] = []
    ready_to_answer(model, template, notice=notices.append)
    assert not notices


@pytest.mark.parametrize("name", CONFIGS)
def test_chat_and_merge_work_with_a_generation_config_that_prevents_stopping(models, tmp_path, capsys, name):
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(models("llama"), base)
    (base / "generation_config.json").write_text(json.dumps(CONFIGS[name]))
    model = new_adapter(
        load_base(BaseSpec(path=str(base), dtype=torch.float32, device=CPU)),
        LoraSpec(rank=4, alpha=8, dropout=0.0, targets=["q_proj"]),
    )
    model.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    assert main(["merge", "--adapter_path", str(adapter), "--output_dir", str(merged)]) == 0
    written = json.loads((merged / "generation_config.json").read_text())
    assert written["eos_token_id"] in (2, [2])
    assert "min_new_tokens" not in written
    assert main(["chat", "--adapter_path", str(adapter), "--prompt", "x", "--max_new_tokens", "3"]) == 0
    assert "not used from the base's generation config" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_encode_any_text_is_refused():
    # Found by ten thousand alterations of tokenizer.json: an empty prompt makes a float tensor.
    backend = Tokenizer(tokenizer_models.BPE(vocab={"</s>": 0}, merges=[]))
    empty = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    template = load_template("plain", empty)
    with pytest.raises(BadModel, match="has no token for any part"):
        prompt_ids(template, [{"role": "user", "content": "Who are you?"}])
