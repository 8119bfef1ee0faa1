"""PEFT keys: PEFT finds every tensor of a text class's adapter in the whole class, and the answers are unchanged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from atomtune.cli import main
from atomtune.evaluate.run_folder import run_records
from atomtune.model.adapter import load_trained
from atomtune.train.checkpoint.start import FromWeights, find_start
from tests.conftest import DIALOGUES
from tests.trained import train_by_heart
from tests.vision_language import write_checkpoint


@pytest.fixture(scope="module")
def text_adapter(models, tmp_path_factory) -> Path:
    return train_by_heart(models("gemma3_text"), tmp_path_factory.mktemp("gemma"), DIALOGUES, steps=10)


@pytest.fixture(scope="module")
def whole_base(models, tmp_path_factory) -> Path:
    """A vision-language checkpoint whose text model has the same weights as the text class's base."""
    folder = tmp_path_factory.mktemp("whole")
    text = AutoModelForCausalLM.from_pretrained(models("gemma3_text"), dtype=torch.float32)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=AutoConfig.from_pretrained(models("gemma3_text")).to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
    )
    whole = Gemma3ForConditionalGeneration(config).float()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.save_pretrained(folder)
    return folder


def export_to(class_name: str, adapter: Path, base: Path, out: Path) -> int:
    words = ["--adapter_path", str(adapter), "--output_dir", str(out), "--model_path", str(base), "--other_base"]
    return main(["export", *words, "--to", "peft", "--for", class_name])


@torch.no_grad()
def test_the_vision_language_class_loads_every_tensor_with_the_same_logits(models, text_adapter, whole_base, tmp_path):
    out = tmp_path / "out"
    assert export_to("Gemma3ForConditionalGeneration", text_adapter, whole_base, out) == 0
    ids = torch.arange(20)[None] + 5
    text = AutoModelForCausalLM.from_pretrained(models("gemma3_text"), dtype=torch.float32)
    expected = PeftModel.from_pretrained(text, str(text_adapter)).eval()(input_ids=ids).logits
    whole = Gemma3ForConditionalGeneration.from_pretrained(whole_base, dtype=torch.float32)
    base_logits = whole.eval()(input_ids=ids).logits
    logits = PeftModel.from_pretrained(whole, str(out)).eval()(input_ids=ids).logits
    assert not torch.allclose(base_logits, expected, atol=1e-3)
    assert torch.allclose(logits, expected, atol=1e-4)  # float32; the whole class builds its masks differently


def test_exporting_back_to_the_text_class_restores_the_tensor_names(models, text_adapter, whole_base, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    assert export_to("Gemma3ForConditionalGeneration", text_adapter, whole_base, out) == 0
    assert export_to("Gemma3ForCausalLM", out, models("gemma3_text"), back) == 0
    weights, again = (load_file(folder / "adapter_model.safetensors") for folder in (text_adapter, back))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_qwen3_5_linear_attention_tensors_are_loaded_in_both_classes(tmp_path):
    """The checkpoint names the whole class, like the published Qwen3.5; the adapter does the same in both classes."""
    base = write_checkpoint("qwen3_5", tmp_path / "base")
    adapter = train_by_heart(base, tmp_path, DIALOGUES, steps=3)
    ids = torch.arange(20)[None] + 5
    logits = []
    for class_name in ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"):
        out = tmp_path / class_name
        assert export_to(class_name, adapter, base, out) == 0
        model = getattr(transformers, class_name).from_pretrained(base, dtype=torch.float32).eval()
        with torch.no_grad():
            plain = model(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(model, str(out)).eval()
        names = [name for name in adapted.state_dict() if "lora_B" in name]
        assert len(names) == len([name for name in load_file(out / "adapter_model.safetensors") if "lora_B" in name])
        assert all(adapted.state_dict()[name].abs().sum() > 0 for name in names), "one of them was not found"
        assert any("in_proj_qkv" in name for name in names)
        with torch.no_grad():
            logits.append(adapted(input_ids=ids).logits)
        assert not torch.allclose(logits[-1], plain, atol=1e-3)
    assert torch.allclose(*logits, atol=1e-4)  # float32; the whole class computes positions differently


def test_target_modules_given_as_full_names_are_renamed(text_adapter, whole_base, tmp_path):
    spelled = Path(shutil.copytree(text_adapter, tmp_path / "spelled"))
    file = spelled / "adapter_config.json"
    values = json.loads(file.read_text())
    values["target_modules"] = ["model.layers.0.mlp.up_proj", "q_proj"]
    file.write_text(json.dumps(values))
    assert export_to("Gemma3ForConditionalGeneration", spelled, whole_base, tmp_path / "out") == 0
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["model.language_model.layers.0.mlp.up_proj", "q_proj"]


@torch.no_grad()
def test_target_modules_given_as_a_pattern_are_replaced_by_the_new_names(models, text_adapter, whole_base, tmp_path):
    # Regression: PEFT did not load the copy, because the pattern matched no layer under its new name.
    spelled = Path(shutil.copytree(text_adapter, tmp_path / "spelled"))
    file = spelled / "adapter_config.json"
    values = {**json.loads(file.read_text()), "target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"}
    file.write_text(json.dumps(values))
    ids = torch.arange(20)[None] + 5
    text = AutoModelForCausalLM.from_pretrained(models("gemma3_text"), dtype=torch.float32)
    expected = PeftModel.from_pretrained(text, str(spelled)).eval()(input_ids=ids).logits
    assert export_to("Gemma3ForConditionalGeneration", spelled, whole_base, tmp_path / "out") == 0
    whole = Gemma3ForConditionalGeneration.from_pretrained(whole_base, dtype=torch.float32)
    logits = PeftModel.from_pretrained(whole, str(tmp_path / "out")).eval()(input_ids=ids).logits
    assert torch.allclose(logits, expected, atol=1e-4)  # float32; the whole class builds its masks differently


def test_an_unknown_or_incompatible_model_class_is_refused(text_adapter, whole_base, tmp_path, capsys):
    for class_name, message in (("NoSuchForCausalLM", "no such class"), ("GPT2LMHeadModel", "it is not a class for")):
        assert export_to(class_name, text_adapter, whole_base, tmp_path / "out") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["half of it", "none of it"])
def test_truncated_or_missing_adapter_weights_are_reported(text_adapter, whole_base, tmp_path, capsys, fault):
    adapter = shutil.copytree(text_adapter, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    if fault == "half of it":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    assert export_to("Gemma3ForConditionalGeneration", adapter, whole_base, tmp_path / "out") == 2
    assert (
        "cannot be read as tensors" if fault == "half of it" else "no adapter weights here"
    ) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_alora_adapter_keeps_its_settings_in_the_peft_export(text_adapter, whole_base, tmp_path):
    adapter = Path(shutil.copytree(text_adapter, tmp_path / "alora"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": [5, 6]}))
    assert export_to("Gemma3ForConditionalGeneration", adapter, whole_base, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["alora_invocation_tokens"] == [5, 6]


def test_the_export_is_not_listed_as_a_run_but_keeps_its_run_json(text_adapter, whole_base, tmp_path, capsys):
    run = shutil.copytree(text_adapter, tmp_path / "runs" / "run")
    out = tmp_path / "runs" / "exported"
    assert export_to("Gemma3ForConditionalGeneration", run, whole_base, out) == 0
    capsys.readouterr()
    assert main(["runs", str(tmp_path / "runs"), "--json"]) == 0
    assert [listed["folder"] for listed in json.loads(capsys.readouterr().out)] == [str(run)]
    assert run_records(run) is not None
    assert run_records(out) == run_records(run)
    record, copied = (json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in (run, out))
    assert copied == {**record, "exported_for": "Gemma3ForConditionalGeneration"}


def test_the_exported_card_loads_the_base_with_the_target_class(models, text_adapter, whole_base, tmp_path):
    card, whole, back = ((folder / "README.md") for folder in (text_adapter, tmp_path / "out", tmp_path / "back"))
    assert export_to("Gemma3ForConditionalGeneration", text_adapter, whole_base, whole.parent) == 0
    assert export_to("Gemma3ForCausalLM", whole.parent, models("gemma3_text"), back.parent) == 0
    for copy, name in ((whole, "Gemma3ForConditionalGeneration"), (back, "Gemma3ForCausalLM")):
        assert "AutoModelForCausalLM" in card.read_text()
        assert copy.read_text() == card.read_text().replace("AutoModelForCausalLM", name)
        assert f"base = {name}.from_pretrained(" in copy.read_text()


def test_a_named_pipe_in_the_adapter_folder_is_not_copied(text_adapter, whole_base, tmp_path):
    adapter = shutil.copytree(text_adapter, tmp_path / "adapter")
    os.mkfifo(adapter / "pipe")
    assert export_to("Gemma3ForConditionalGeneration", adapter, whole_base, tmp_path / "out") == 0
    assert not (tmp_path / "out" / "pipe").exists() and (tmp_path / "out" / "atomtune.json").is_file()


def test_a_merged_model_inside_the_run_folder_is_not_copied(text_adapter, whole_base, tmp_path):
    # `train` itself suggests to merge into a folder there. Regression: gigabytes were copied with a small adapter.
    adapter = shutil.copytree(text_adapter, tmp_path / "adapter")
    for name in ("merged", "additional_chat_templates"):
        (adapter / name).mkdir()
        (adapter / name / "x.jinja").write_text("x")
    assert export_to("Gemma3ForConditionalGeneration", adapter, whole_base, tmp_path / "out") == 0
    assert not (tmp_path / "out" / "merged").exists()
    assert (tmp_path / "out" / "additional_chat_templates" / "x.jinja").is_file()


def test_the_state_of_the_training_in_a_checkpoint_is_not_exported(text_adapter, whole_base, tmp_path):
    # Regression: --continue_training refused the copy as a damaged checkpoint: its manifest was of the old names.
    (checkpoint,) = text_adapter.glob("checkpoint-*")
    assert export_to("Gemma3ForConditionalGeneration", checkpoint, whole_base, tmp_path / "out") == 0
    copied, in_checkpoint, in_run = (
        {file.name for file in folder.iterdir()} for folder in (tmp_path / "out", checkpoint, text_adapter)
    )
    assert copied == in_checkpoint & in_run
    flags = {"resume": False, "resume_from_checkpoint": None, "lengths": {}, "notice": print}
    start = find_start(tmp_path / "new", checkpoint=str(tmp_path / "out"), **flags)
    assert start == FromWeights(tmp_path / "out" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs ulimit")
def test_a_full_disk_is_reported_without_a_traceback(text_adapter, whole_base, tmp_path):
    words = ["--adapter_path", text_adapter, "--output_dir", tmp_path / "out", "--model_path", whole_base]
    words += ["--other_base", "--to", "peft", "--for_class", "Gemma3ForConditionalGeneration"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 1; exec "$0" -m atomtune export "$@"', sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "the disk is full or failing: " in done.stderr and ": File too large.\n" in done.stderr
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_rank_and_alpha_patterns_with_full_names_are_renamed(models, text_adapter, whole_base, tmp_path):
    """PEFT's EVA writes such names, and PEFT skips unknown ones. Regression: the adapter had half its strength."""
    spelled = Path(shutil.copytree(text_adapter, tmp_path / "spelled"))
    config, certificate = spelled / "adapter_config.json", spelled / "certificate.json"
    layers = [name for name in load_file(spelled / "adapter_model.safetensors") if "lora_A" in name]
    names = [name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in layers]
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "alpha_pattern": dict.fromkeys(names, 2 * values["lora_alpha"])}))
    certificate.write_text('[{"engine": "vllm", "holds": true}]')
    out = tmp_path / "out"
    assert export_to("Gemma3ForConditionalGeneration", spelled, whole_base, out) == 0
    assert not (out / "certificate.json").exists(), "it is of the adapter under its old names"
    ids = torch.arange(20)[None] + 5
    text = AutoModelForCausalLM.from_pretrained(models("gemma3_text"), dtype=torch.float32)
    expected = PeftModel.from_pretrained(text, str(spelled)).eval()(input_ids=ids).logits
    whole = Gemma3ForConditionalGeneration.from_pretrained(whole_base, dtype=torch.float32)
    exported = PeftModel.from_pretrained(whole, str(out)).eval()(input_ids=ids).logits
    assert torch.allclose(exported, expected, atol=1e-4)  # float32; the whole class builds its masks differently
    whole = Gemma3ForConditionalGeneration.from_pretrained(whole_base, dtype=torch.float32)
    loaded = load_trained(whole, spelled)(input_ids=ids).logits  # in the way of chat and evaluate
    assert torch.allclose(loaded, expected, atol=1e-4)
