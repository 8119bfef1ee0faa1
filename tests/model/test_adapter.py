"""Adapters: a file fills every tensor of the adapter, or the tensors that do not fit are named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from atomtune.cli import main
from atomtune.errors import BadModel
from atomtune.model.adapter import (
    LoraSpec,
    answering_as,
    fill_again,
    left_out_by_peft,
    load_another,
    load_trained,
    new_adapter,
    start_from_weights,
)
from atomtune.model.adapter_folder import base_of
from atomtune.model.load import BaseSpec, load_base
from tests.tiny import SIZE

CPU = torch.device("cpu")
LORA = LoraSpec(rank=4, alpha=8, dropout=0.0, targets=["q_proj", "v_proj"])


def base(models):
    return load_base(BaseSpec(path=str(models("llama")), dtype=torch.float32, device=CPU))


@pytest.fixture
def saved(models, tmp_path):
    """An adapter's folder as a run leaves it, with a B that is not zero."""
    model = new_adapter(base(models), LORA)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    return tmp_path


def spoil(folder, change) -> str:
    """Write the tensors after `change`; returns the name of the first tensor, which the tests damage."""
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    first = min(weights)
    save_file(change(weights, first), file)
    return first


def test_a_saved_adapter_that_includes_the_output_matrix_is_loaded(models, tmp_path):
    # PEFT saves it if the output layer has an adapter; atomtune does not.
    lora = LoraSpec(rank=4, alpha=8, dropout=0.0, targets=["all-linear", "lm_head"])
    model = new_adapter(base(models), lora)
    torch.nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        type(model).save_pretrained(model, tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert all("lora_" in name for name in ours) and len(ours) < len(theirs)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        for folder in ("ours", "theirs"):
            assert torch.equal(load_trained(base(models), tmp_path / folder)(ids).logits, model.eval()(ids).logits)


def test_a_loaded_adapter_changes_the_bases_logits(models, saved):
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        plain, adapted = base(models)(input_ids=ids).logits, load_trained(base(models), saved)(input_ids=ids).logits
    assert not torch.allclose(plain, adapted, atol=1e-3)


def test_training_continues_with_every_weight_of_a_saved_adapter(models, saved):
    # A saved config says that the adapter is for inference, for which PEFT freezes it.
    assert json.loads((saved / "adapter_config.json").read_text())["inference_mode"]
    new = new_adapter(base(models), LORA)
    model = start_from_weights(base(models), saved / "adapter_model.safetensors", LORA, notice=print)
    trained, expected = ({n for n, w in m.named_parameters() if w.requires_grad} for m in (model, new))
    assert trained == expected


def test_an_adapter_stores_the_absolute_path_of_its_base(models, tmp_path, monkeypatch):
    folder = Path(models("llama"))
    monkeypatch.chdir(folder.parent)
    model = new_adapter(load_base(BaseSpec(path=folder.name, dtype=torch.float32, device=CPU)), LORA)
    model.save_pretrained(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert base_of(tmp_path / "run", None) == str(folder)


def test_a_second_adapter_gives_the_same_logits_as_when_loaded_alone(models, saved, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(saved, other, dirs_exist_ok=True)
    spoil(other, lambda w, _: {name: tensor * 2 for name, tensor in w.items()})
    both, ids = load_trained(base(models), saved), torch.arange(3, 15)[None]
    load_another(both, other, "second")
    with torch.no_grad():
        for name, folder in (("second", other), ("default", saved)):
            both.set_adapter(name)
            assert torch.equal(both(input_ids=ids).logits, load_trained(base(models), folder)(input_ids=ids).logits)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_reset_when_their_adapter_is_switched_off(models, tmp_path, bias):
    # PEFT keeps them when an adapter is switched off, so base and tuned model were compared with the same biases.
    layers = {"r": 4, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    for name, of_biases in (("biased", bias), ("plain", "none")):
        model = get_peft_model(gpt2(models), LoraConfig(**layers, bias=of_biases))
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        model.save_pretrained(tmp_path / name)
    alone = {
        None: logits_of(gpt2(models)),
        "default": logits_of(PeftModel.from_pretrained(gpt2(models), tmp_path / "biased")),
        "second": logits_of(PeftModel.from_pretrained(gpt2(models), tmp_path / "plain")),
    }
    both = load_trained(gpt2(models), tmp_path / "biased")
    load_another(both, tmp_path / "plain", "second")
    for adapter in (None, "default", "second", None, "second", "default"):
        with answering_as(both, adapter):
            assert torch.equal(logits_of(both), alone[adapter]), adapter
    lora = LoraSpec(rank=4, alpha=8, dropout=0.0, targets=["c_attn"])
    goes_on = start_from_weights(
        gpt2(models), tmp_path / "biased" / "adapter_model.safetensors", lora, notice=lambda _: None
    ).eval()
    with answering_as(goes_on, None):
        assert torch.equal(logits_of(goes_on), alone[None])
    assert torch.equal(logits_of(goes_on), alone["default"])


def test_an_adapter_beside_one_with_trained_token_rows_is_refused(models, saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5], task_type="CAUSAL_LM")
    get_peft_model(base(models), config).save_pretrained(folder)
    with pytest.raises(BadModel, match="embeddings of single tokens"):
        load_another(load_trained(base(models), folder), saved, "second")


def gpt2(models):
    return load_base(BaseSpec(path=str(models("gpt2")), dtype=torch.float32, device=CPU))


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(3, 15)[None]).logits


LAGUNA = {
    **{**SIZE, "head_dim": 8, "sliding_window": 16, "vocab_size": 97, "num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "pad_token_id": None},
}


@pytest.mark.skipif("laguna" not in CONFIG_MAPPING, reason="transformers does not have it")
def test_layers_that_peft_renames_by_mistake_are_still_loaded(tmp_path):
    # PEFT renames `shared_experts` to a name that no layer has, and leaves three layers as they were initialized.
    def laguna():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("laguna", **LAGUNA))

    model = new_adapter(laguna(), LoraSpec(rank=4, alpha=8, dropout=0.0, targets=["all-linear"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path)
    expected = logits_of(model)
    assert torch.equal(logits_of(load_trained(laguna(), tmp_path)), expected)
    lora = LoraSpec(rank=4, alpha=8, dropout=0.0, targets=["all-linear"])
    file = tmp_path / "adapter_model.safetensors"
    goes_on = start_from_weights(laguna(), file, lora, notice=lambda _: None)
    assert torch.equal(logits_of(goes_on), expected)
    for weight in goes_on.parameters():
        if weight.requires_grad:
            weight.data += 1
    fill_again(goes_on, tmp_path)  # as at the end of a run, with its best checkpoint
    assert torch.equal(logits_of(goes_on), expected)

    assert all("shared_experts" in layer for layer in left_out_by_peft(model))
    assert torch.equal(logits_of(model), expected), "to ask changes nothing"


def test_peft_leaves_no_layer_out_in_other_models(models):
    assert left_out_by_peft(new_adapter(base(models), LORA)) == []


@pytest.mark.parametrize("use", ["to answer", "beside another"])
def test_an_invalid_target_modules_regex_is_refused_and_named(models, saved, use):
    another = load_trained(base(models), saved)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "target_modules": "("}))
    with pytest.raises(BadModel, match="'\\(' is not a regex"):
        if use == "to answer":
            load_trained(base(models), saved)
        else:
            load_another(another, saved, "second")


FAULTS = {
    "missing": (lambda w, first: {n: t for n, t in w.items() if n != first}, "not in the file"),
    "renamed": (lambda w, first: {n.replace("self_attn", "attention"): t for n, t in w.items()}, "not in this model"),
    "integers": (lambda w, first: {**w, first: w[first].int()}, "holds int32"),
    "NaN": (lambda w, first: {**w, first: w[first] * torch.nan}, "not finite"),
    "eight bits": (lambda w, first: {**w, first: w[first].to(torch.float8_e4m3fn)}, "holds float8_e4m3fn; expected"),
    "transposed": (lambda w, first: {**w, first: w[first].T.contiguous()}, "(4, 32) in this model"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("use", ["to answer", "to train on", "beside another"])
def test_an_adapter_tensor_that_does_not_fit_the_model_is_named(models, saved, fault, use):
    change, reason = FAULTS[fault]
    another = load_trained(base(models), saved)
    first = spoil(saved, change)
    with pytest.raises(BadModel) as raised:
        if use == "to answer":
            load_trained(base(models), saved)
        elif use == "beside another":
            load_another(another, saved, "second")
        else:
            start_from_weights(base(models), saved / "adapter_model.safetensors", LORA, notice=print)
    assert reason in str(raised.value)
    assert first in str(raised.value)


@pytest.mark.parametrize("command", ["chat", "merge"])
def test_chat_and_merge_exit_with_2_for_an_adapter_that_does_not_fit(models, saved, tmp_path, capsys, command):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(models("llama")).save_pretrained(saved)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(models("llama"))}))
    spoil(saved, FAULTS["renamed"][0])
    flags = ["--prompt", "x"] if command == "chat" else ["--output_dir", str(tmp_path / "merged")]
    assert main([command, "--adapter_path", str(saved), *flags]) == 2
    assert "not in this model" in capsys.readouterr().err
