"""Merge: a plain folder that answers as the adapter does, and a certificate that can fail."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from atomtune.cli import main
from atomtune.export import merge


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    from tests.conftest import DIALOGUES, write_jsonl

    folder = tmp_path_factory.mktemp("merge")
    data = write_jsonl(folder / "data.reading.jsonl", DIALOGUES)
    command = ["train", "--model_path", str(models("llama")), "--dataset_path", str(data)]
    flags = ["--output_dir", str(folder / "out"), "--max_steps", "4", "--learning_rate", "2e-2", "--dtype", "float32"]
    assert main([*command, *flags]) == 0
    return models("llama"), folder / "out"


def test_the_merged_folder_is_a_plain_model_with_the_adapters_logits(trained, tmp_path, capsys):
    base, adapter = trained
    assert main(["merge", "--adapter_path", str(adapter), "--output_dir", str(tmp_path / "m")]) == 0
    assert "allowed in float32" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "晚安"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)  # one rounding of W + BA in float32
    assert merged.generation_config.eos_token_id in (2, [2])
    assert merged.config.use_cache


def test_chat_answers_from_the_merged_folder_as_from_the_adapter(trained, tmp_path, capsys):
    _, adapter = trained
    assert main(["merge", "--adapter_path", str(adapter), "--output_dir", str(tmp_path / "m")]) == 0
    said = []
    for folder in (adapter, tmp_path / "m"):
        capsys.readouterr()
        flags = ["--prompt", "晚安", "--max_new_tokens", "8", "--dtype", "float32"]
        assert main(["chat", "--adapter_path", str(folder), *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_merge_that_changed_the_answers_fails_with_exit_code_4(trained, tmp_path, capsys, monkeypatch):
    """The bug: something is lost between the adapter and the written folder."""
    real = merge.load_base

    def forgetful(spec):
        model = real(spec)
        if spec.path.endswith("m"):
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        return model

    monkeypatch.setattr(merge, "load_base", forgetful)
    assert main(["merge", "--adapter_path", str(trained[1]), "--output_dir", str(tmp_path / "m")]) == 4
    assert "do not serve it" in capsys.readouterr().err


def test_a_folder_that_is_not_empty_is_left_alone(trained, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["merge", "--adapter_path", str(trained[1]), "--output_dir", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_a_base_that_moved_is_asked_for(trained, tmp_path, capsys):
    import json
    import shutil

    moved = tmp_path / "adapter"
    shutil.copytree(trained[1], moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/gone/away"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    assert main(["merge", "--adapter_path", str(moved), "--output_dir", str(tmp_path / "m")]) == 2
    assert "--model_path" in capsys.readouterr().err
    again = ["--model_path", str(trained[0])]
    assert main(["merge", "--adapter_path", str(moved), "--output_dir", str(tmp_path / "m"), *again]) == 0


def test_a_disk_too_small_for_the_merged_model_is_told_so(trained, tmp_path, monkeypatch, capsys):
    _, adapter = trained

    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(self, *args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert main(["merge", "--adapter_path", str(adapter), "--output_dir", str(tmp_path / "merged")]) == 3
    said = capsys.readouterr().err
    assert "the disk is full" in said
    assert "Traceback" not in said
