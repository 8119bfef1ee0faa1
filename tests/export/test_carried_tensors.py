"""Carried tensors: tensors that the class does not load are in the merged folder, unchanged and in its index."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from atomtune.cli import main
from atomtune.export.carried_tensors import carry_over, changed, keep_unrounded
from atomtune.model.fingerprint import INDEX, weight_files
from tests.adapters import adapter_on
from tests.hybrids import write_walked

MORE = {"mtp.norm.weight": torch.arange(4, dtype=torch.bfloat16), "mtp.fc.weight": torch.randn(3, 5)}
#: Tensors in a base's files that its class skips without a message.
IGNORED: dict[str, dict[str, torch.Tensor]] = {"llama": {}, "gpt2": {"h.0.crossattention.bias": torch.ones(1, 1, 4, 4)}}
OLD_BUFFER = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


def folders(models, tmp_path):
    """A base whose files have more tensors than its class loads, the model written again, and its tensors' names."""
    base, out = tmp_path / "base", tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(models("llama"))
    for folder in (base, out):
        model.save_pretrained(folder)
    file = base / "model.safetensors"
    save_file({**load_file(file), **MORE, **OLD_BUFFER}, file, metadata={"format": "pt"})
    return base, out, model


def test_tensors_that_the_class_does_not_load_are_copied_bit_for_bit(models, tmp_path):
    base, out, model = folders(models, tmp_path)
    before = load_file(out / "model.safetensors")
    assert carry_over(base, out, loaded=model.state_dict().keys(), prefix="model") == (
        "mtp.fc.weight",
        "mtp.norm.weight",
    )
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    assert weight_map.keys() == {*before, *MORE}
    for name, tensor in {**before, **MORE}.items():
        assert torch.equal(load_file(out / weight_map[name])[name], tensor)
    assert {file.name for file in weight_files(out)} == {file.name for file in out.glob("*.safetensors")}
    again, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert set(report["unexpected_keys"]) == MORE.keys()  # llama's class does not ignore them; Qwen3.5's does
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_nothing_is_carried_over_if_the_class_loads_every_tensor(models, tmp_path):
    _, out, model = folders(models, tmp_path)
    assert carry_over(models("llama"), out, loaded=model.state_dict().keys(), prefix="model") == ()
    assert not (out / INDEX).exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_base_tensors_stored_without_the_class_prefix_are_not_carried_over(models, tmp_path, family):
    # Regression: the whole base was copied next to the merged weights, and replaced them when both were loaded.
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(models(family), base)
    prefix = AutoModelForCausalLM.from_pretrained(base).base_model_prefix
    file = base / "model.safetensors"
    stored = {name.removeprefix(f"{prefix}."): tensor for name, tensor in load_file(file).items()}
    save_file({**stored, **IGNORED[family]}, file, metadata={"format": "pt"})
    adapter_on(base, adapter, size=0.5)
    assert main(["merge", "--adapter_path", str(adapter), "--output_dir", str(out)]) == 0
    names = {name for file in weight_files(out) for name in load_file(file)}
    assert names == {*load_file(models(family) / "model.safetensors"), *IGNORED[family]}


@pytest.mark.parametrize("more", [[], ["--dtype", "float16"]])
def test_float32_tensors_of_a_bfloat16_base_are_written_unrounded(tmp_path, capsys, more):
    # For example Qwen3.5's A_log and norms. transformers rounds them; vLLM and SGLang do not.
    base, adapter, out = write_walked("qwen3_5_text", tmp_path / "base"), tmp_path / "adapter", tmp_path / "out"
    file = base / "model.safetensors"
    draw = torch.Generator().manual_seed(5)
    stored = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    unrounded = {name: torch.rand(stored[name].shape, generator=draw) for name in stored if "A_log" in name}
    changed_too = "model.layers.0.mlp.down_proj.weight"
    unrounded[changed_too] = torch.randn(stored[changed_too].shape, generator=draw)
    save_file({**stored, **unrounded}, file, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))

    adapter_on(base, adapter, size=0.5, targets=["down_proj"])
    assert main(["merge", "--adapter_path", str(adapter), "--output_dir", str(out), *more]) == 0
    assert "tensors that the base's files hold in more bits" in capsys.readouterr().out
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == stored.keys()
    for name, tensor in merged.items():
        if "down_proj" in name:
            assert tensor.dtype == (torch.float16 if more else torch.bfloat16)
        elif name in unrounded:
            assert torch.equal(tensor, unrounded[name]), name
        else:
            assert torch.equal(tensor, stored[name].to(tensor.dtype)) and tensor.itemsize == 2, name


@pytest.mark.parametrize("left_out", ["", "model."], ids=["names of the class", "names without its prefix"])
def test_tensors_are_kept_unrounded_in_the_shards_that_hold_them(models, tmp_path, left_out):
    base, out = tmp_path / "base", tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(models("llama"))
    model.save_pretrained(base)
    model.bfloat16().save_pretrained(out, max_shard_size="40KB")
    shards = weight_files(out)
    assert len(shards) > 1
    changed_one, norm = "model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"
    scalar = "model.limit"  # Gemma 4 has such buffers; a tensor without dimensions cannot be viewed as bytes
    (shard,) = [file for file in shards if changed_one in load_file(file)]
    own = {changed_one: torch.zeros(64, 32), scalar: torch.tensor(1.23).bfloat16()}
    save_file({**load_file(shard), **own}, shard, metadata={"format": "pt"})

    file = base / "model.safetensors"
    assert keep_unrounded(base, out, prefix="model") == (), "a base in float32 throughout may be merged in bfloat16"
    unrounded = {norm: torch.rand(32), scalar: torch.tensor(1.23), changed_one: load_file(file)[changed_one]}
    (holder,) = [file for file in shards if norm in load_file(file)]
    save_file({**load_file(holder), norm: unrounded[norm].bfloat16()}, holder, metadata={"format": "pt"})
    stored = {**{name: tensor.bfloat16() for name, tensor in load_file(file).items()}, **unrounded}
    save_file({name.removeprefix(left_out): tensor for name, tensor in stored.items()}, file, metadata={"format": "pt"})
    assert keep_unrounded(base, out, prefix="model") == (norm, scalar)
    assert changed(base, out, stored.keys(), prefix="model") == [changed_one]
    assert weight_files(out) == shards and {file.suffix for file in out.iterdir()} == {".json", ".safetensors"}
    index = json.loads((out / INDEX).read_text())
    written = {name: (file.name, tensor.nbytes) for file in shards for name, tensor in load_file(file).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in written.items()}
    assert index["metadata"]["total_size"] == sum(size for _, size in written.values())


def test_a_changed_carried_tensor_is_reported(models, tmp_path):
    base, out, model = folders(models, tmp_path)
    names = carry_over(base, out, loaded=model.state_dict().keys(), prefix="model")
    assert changed(base, out, names, prefix="model") == []
    shard = weight_files(out)[-1]
    save_file({**MORE, "mtp.fc.weight": -MORE["mtp.fc.weight"]}, shard, metadata={"format": "pt"})
    assert changed(base, out, names, prefix="model") == ["mtp.fc.weight"]
