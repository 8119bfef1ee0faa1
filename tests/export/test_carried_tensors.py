"""Carried tensors: what a class does not load is in the merged folder as it was, in one index with all the rest."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from atomtune.export.carried_tensors import carry_over, changed
from atomtune.model.fingerprint import INDEX, weight_files

MORE = {"mtp.norm.weight": torch.arange(4, dtype=torch.bfloat16), "mtp.fc.weight": torch.randn(3, 5)}
OLD_BUFFER = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


def folders(models, tmp_path):
    """A base whose files hold more than its class loads, the same model written again, and its tensors' names."""
    base, out = tmp_path / "base", tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(models("llama"))
    for folder in (base, out):
        model.save_pretrained(folder)
    file = base / "model.safetensors"
    save_file({**load_file(file), **MORE, **OLD_BUFFER}, file, metadata={"format": "pt"})
    return base, out, model


def test_what_the_class_does_not_load_is_carried_over_bit_by_bit(models, tmp_path):
    base, out, model = folders(models, tmp_path)
    before = load_file(out / "model.safetensors")
    assert carry_over(base, out, loaded=model.state_dict().keys()) == ("mtp.fc.weight", "mtp.norm.weight")
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    assert weight_map.keys() == {*before, *MORE}
    for name, tensor in {**before, **MORE}.items():
        assert torch.equal(load_file(out / weight_map[name])[name], tensor)
    assert {file.name for file in weight_files(out)} == {file.name for file in out.glob("*.safetensors")}
    again, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert set(report["unexpected_keys"]) == MORE.keys()  # llama's class does not ignore them; Qwen3.5's does
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_nothing_is_carried_where_the_class_loads_all(models, tmp_path):
    _, out, model = folders(models, tmp_path)
    assert carry_over(models("llama"), out, loaded=model.state_dict().keys()) == ()
    assert not (out / INDEX).exists()


def test_a_carried_tensor_that_is_another_is_told(models, tmp_path):
    base, out, model = folders(models, tmp_path)
    names = carry_over(base, out, loaded=model.state_dict().keys())
    assert changed(base, out, names) == []
    shard = weight_files(out)[-1]
    save_file({**MORE, "mtp.fc.weight": -MORE["mtp.fc.weight"]}, shard, metadata={"format": "pt"})
    assert changed(base, out, names) == ["mtp.fc.weight"]
