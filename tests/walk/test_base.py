"""An adapter belongs to one base: load, merge and chat refuse another base of the same shape, but accept a copy."""

import shutil
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file, save_file

from atomtune.cli import main
from atomtune.model.fingerprint import fingerprint


@pytest.fixture
def base(models, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(models("llama"), folder)
    return folder


@pytest.fixture
def trained(models, dialogues, tmp_path):
    """The folder of a run on the tiny llama."""
    out = tmp_path / "out"
    command = ["train", "--dataset_path", str(dialogues), "--max_steps", "2", "--model_path", str(models("llama"))]
    assert main([*command, "--output_dir", str(out)]) == 0
    return out


def changed(folder, change) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({name: change(name, tensor.clone()) for name, tensor in weights.items()}, file, metadata={"format": "pt"})


def tuned(name, tensor):
    """Change one projection a little, as if a fine-tuning were merged in; embeddings and norms stay."""
    return tensor * 1.05 if name.endswith("layers.1.self_attn.q_proj.weight") else tensor


def test_a_copy_in_another_dtype_or_in_shards_is_the_same_base(models, base):
    expected = fingerprint(str(models("llama")))
    assert fingerprint(str(base)) == expected
    changed(base, lambda name, tensor: tensor.to(torch.bfloat16))
    assert fingerprint(str(base)) == expected
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base / "shards", max_shard_size="50KB")
    assert len(list((base / "shards").glob("*.safetensors"))) > 1
    assert fingerprint(str(base / "shards")) == expected


def test_a_fine_tuned_copy_has_a_different_fingerprint(models, base):
    changed(base, tuned)
    assert fingerprint(str(base)) != fingerprint(str(models("llama")))


def test_another_base_of_the_same_shape_is_refused_by_chat_merge_and_resume(models, base, dialogues, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["train", "--dataset_path", str(dialogues), "--max_steps", "2", "--save_steps", "1"]
    assert main([*command, "--model_path", str(models("llama")), "--output_dir", str(out)]) == 0
    changed(base, tuned)
    capsys.readouterr()
    merged = tmp_path / "merged"
    uses = (["chat", "--prompt", "x", "--max_new_tokens", "2"], ["merge", "--output_dir", str(merged)])
    for use in uses:
        asked = [*use, "--adapter_path", str(out), "--model_path", str(base)]
        assert main(asked) == 2
        told = capsys.readouterr().err
        assert "is not the base this adapter was trained on" in told
        assert "--other_base" in told
        assert main([*asked, "--other_base"]) == 0
        told = capsys.readouterr()
        assert "is not the base" in told.out + told.err
    longer = [*command, "--max_steps", "4", "--model_path", str(base), "--output_dir", str(out), "--resume"]
    assert main(longer) == 2
    assert "the base's weights (checksum): " in capsys.readouterr().err
    assert main([*longer, "--resume_anyway"]) == 0
    assert "is not the base this adapter was trained on" in capsys.readouterr().out


@pytest.mark.parametrize("use", ["merge", "certify"])
def test_a_base_downloaded_during_loading_is_checked_after_the_download(base, trained, capsys, monkeypatch, use):
    """Before the download there are no weights for a fingerprint, and the check was skipped silently."""
    folder = base.parent
    shutil.copytree(base, folder / "served")
    changed(base, tuned)
    place = base / "model.safetensors"
    place.rename(folder / "on the hub")

    module = import_module("atomtune.export.merge" if use == "merge" else "atomtune.certify.command")
    load = "load_dequantized" if use == "merge" else "load_base"
    real = getattr(module, load)

    def downloaded(*args, **kwargs):
        (folder / "on the hub").rename(place)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, load, downloaded)
    capsys.readouterr()
    flags = ["--served", str(folder / "served"), "--engine", "in-process"]
    if use == "merge":
        flags = ["--output_dir", str(folder / "merged")]
    assert main([use, "--adapter_path", str(trained), "--model_path", str(base), *flags]) == 2
    assert "is not the base this adapter was trained on" in capsys.readouterr().err


def test_a_base_downloaded_during_loading_belongs_to_the_runs_identity(models, dialogues, base, capsys, monkeypatch):
    """The first run of a base on the hub recorded no checksum of it, so its resume compared nothing."""
    place, hub, out = base / "model.safetensors", base.parent / "on the hub", base.parent / "out"
    module = import_module("atomtune.train.model")
    real = module.load_base

    def downloaded(spec):
        if hub.exists():
            hub.rename(place)
        return real(spec)

    def other_row(name, tensor):  # which the fingerprint leaves out
        if "embed_tokens" in name:
            tensor[7] += 1
        return tensor

    monkeypatch.setattr(module, "load_base", downloaded)
    command = ["train", "--dataset_path", str(dialogues), "--model_path", str(base), "--output_dir", str(out)]
    place.rename(hub)
    assert main([*command, "--max_steps", "1"]) == 0
    changed(base, other_row)
    for is_there in (True, False):
        if not is_there:
            place.rename(hub)
        assert main([*command, "--max_steps", "2", "--resume"]) == 2
        assert "the base's weights (checksum): " in capsys.readouterr().err
    place.rename(hub)
    assert main([*command, "--max_steps", "2", "--resume", "--resume_anyway"]) == 0
    assert "the base's weights (checksum): " in capsys.readouterr().out


def test_an_adapter_without_atomtune_metadata_is_loaded(models, dialogues, tmp_path):
    out = tmp_path / "out"
    command = ["train", "--dataset_path", str(dialogues), "--max_steps", "1", "--model_path", str(models("llama"))]
    assert main([*command, "--output_dir", str(out)]) == 0
    (out / "atomtune.json").unlink()
    assert main(["chat", "--prompt", "x", "--max_new_tokens", "2", "--adapter_path", str(out)]) == 0


def pickled(base) -> None:
    """Save the same weights with torch.save, as in older models."""
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")


def test_a_base_without_safetensors_has_a_fingerprint_too(models, base):
    pickled(base)
    assert fingerprint(str(base)) == fingerprint(str(models("llama")))
    torch.save(torch.load(base / "pytorch_model.bin"), base / "old.bin", _use_new_zipfile_serialization=False)
    (base / "old.bin").replace(base / "pytorch_model.bin")
    assert fingerprint(str(base)) == fingerprint(str(models("llama")))


def test_a_different_base_without_safetensors_is_refused(models, base, dialogues, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["train", "--dataset_path", str(dialogues), "--max_steps", "1", "--output_dir", str(out)]
    assert main([*command, "--model_path", str(models("llama"))]) == 0
    changed(base, tuned)
    pickled(base)
    assert main(["chat", "--prompt", "x", "--adapter_path", str(out), "--model_path", str(base)]) == 2
    assert "is not the base this adapter was trained on" in capsys.readouterr().err
