"""Vision-language checkpoints tuned on text: the whole class loads the adapter, and merging keeps the vision tower."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from atomtune.cli import main
from atomtune.errors import BadModel
from atomtune.model.adapter_keys import module_of, refuse_unread
from tests.conftest import DIALOGUES, write_jsonl
from tests.vision_language import CHECKPOINTS, write_checkpoint

LONG = "You are a patient shopkeeper in an old town. Answer briefly, kindly and in the words of a story."


@pytest.fixture(scope="module", params=CHECKPOINTS)
def trained(request, tmp_path_factory):
    """(family, base, output folder)"""
    folder = tmp_path_factory.mktemp(request.param)
    base = write_checkpoint(request.param, folder / "base")
    records = [{**r, "instruction": LONG, "input": f"{r['instruction']} {n}"} for n in range(3) for r in DIALOGUES]
    data = write_jsonl(folder / "dialogues.jsonl", records)
    command = ["train", "--model_path", str(base), "--dataset_path", str(data), "--dtype", "float32"]
    command += ["--max_steps", "4", "--learning_rate", "2e-2", "--per_device_train_batch_size", "4"]
    assert main([*command, "--output_dir", str(folder / "out")]) == 0
    return request.param, base, folder / "out"


@pytest.fixture(scope="module")
def merged(trained):
    out = trained[2].parent / "merged"
    assert main(["merge", "--adapter_path", str(trained[2]), "--output_dir", str(out)]) == 0
    return out


def named_class(base):
    """The class in the checkpoint's `architectures`, which servers build."""
    return getattr(transformers, AutoConfig.from_pretrained(base).architectures[0])


def tensors_in(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(20)[None] + 5).logits


def test_training_shares_prefixes_and_adapts_only_the_language_model(trained):
    _, _, out = trained
    assert json.loads((out / "run.json").read_text())["layout"] == "tree"
    modules = {module_of(name) for name in load_file(out / "adapter_model.safetensors")}
    assert modules
    assert all(".language_model.layers." in module for module in modules)


def test_peft_applies_the_adapter_to_the_class_named_in_the_config(trained):
    family, base, out = trained
    with torch.device("meta"):
        has = {name for name, _ in named_class(base)(AutoConfig.from_pretrained(base)).named_modules()}
    assert {module_of(name) for name in load_file(out / "adapter_model.safetensors")} <= has
    plain = named_class(base).from_pretrained(base, dtype=torch.float32)
    before = logits(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns if the model has no layer for a tensor
        adapted = PeftModel.from_pretrained(plain, str(out))
    assert not torch.allclose(logits(adapted), before, atol=1e-2), family


def test_merging_keeps_every_tensor_and_changes_only_the_adapted_ones(trained, merged):
    _, base, out = trained
    before, after = tensors_in(base), tensors_in(merged)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {f"{module_of(name)}.weight" for name in load_file(out / "adapter_model.safetensors")}
    # Files and class have different names for the language model (Gemma 3, Mistral 3); the names' ends are the same.
    assert {_from_layer(name) for name in changed} == {_from_layer(name) for name in adapted}
    assert (merged / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()
    adapter = PeftModel.from_pretrained(named_class(base).from_pretrained(base, dtype=torch.float32), str(out))
    written = named_class(base).from_pretrained(merged, dtype=torch.float32)
    assert torch.allclose(logits(written), logits(adapter), atol=1e-3)


def test_chat_answers_from_the_merged_folder_as_from_the_adapter(trained, merged, capsys):
    answers = []
    for folder in (trained[2], merged):
        capsys.readouterr()
        flags = ["--prompt", "晚安", "--max_new_tokens", "8", "--dtype", "float32"]
        assert main(["chat", "--adapter_path", str(folder), *flags]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_certify_holds_for_the_adapter_and_the_merged_folder(trained, merged):
    words = ["certify", "--adapter_path", str(trained[2]), "--dtype", "float32", "--engine", "in-process"]
    words += ["--max_new_tokens", "4"]
    assert main(words) == 0
    assert main([*words, "--served", str(merged)]) == 0


def test_a_text_class_adapter_is_merged_into_the_whole_checkpoint(trained, tmp_path, capsys):
    """Other tools train Qwen3.5 as AutoModelForCausalLM loads it; on the whole class, PEFT ignores their tensors."""
    family, base, out = trained
    if family != "qwen3_5":
        pytest.skip("AutoModelForCausalLM gives the whole class")
    text = shutil.copytree(out, tmp_path / "text", ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(out / "adapter_model.safetensors")
    as_text = {name.replace(".language_model.", "."): tensor for name, tensor in weights.items()}
    save_file(as_text, text / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((text / "adapter_config.json").read_text())
    config["target_modules"] = [name.replace(".language_model.", ".") for name in config["target_modules"]]
    (text / "adapter_config.json").write_text(json.dumps(config))
    of_text_class = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(text)
    )

    assert main(["merge", "--adapter_path", str(text), "--output_dir", str(tmp_path / "merged")]) == 0
    written = named_class(base).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logits(written), logits(of_text_class), atol=1e-3)
    with pytest.raises(BadModel, match="would leave them out"):
        refuse_unread(as_text, str(base), trust_remote_code=False)


def _from_layer(name: str) -> str:
    return name[name.index("layers.") :]
