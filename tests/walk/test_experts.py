"""`--lora_experts` is reported, trains a tree, resumes with the same bytes, is verified, merged, answers the same."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from atomtune.cli import main
from tests.conftest import DIALOGUES, write_jsonl
from tests.hybrids import write_walked

LONG = "You are a patient shopkeeper in an old town. Answer briefly, kindly and in the words of a story."
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """(command without output folder, output folder) of a run on a base whose linear experts PEFT knows."""
    folder = tmp_path_factory.mktemp("experts")
    base = write_walked("glm4_moe", folder / "base")
    records = [{**r, "instruction": LONG, "input": f"{r['instruction']} {n}"} for n in range(3) for r in DIALOGUES]
    data = write_jsonl(folder / "dialogues.jsonl", records)
    command = ["train", "--model_path", str(base), "--dataset_path", str(data), "--dtype", "float32"]
    command += [
        "--max_steps",
        "6",
        "--save_steps",
        "3",
        "--learning_rate",
        "5e-3",
        "--per_device_train_batch_size",
        "4",
    ]
    assert main([*command, "--lora_experts", "--output_dir", str(folder / "out")]) == 0
    return command, folder / "out"


def test_experts_and_similar_layers_are_adapted_and_reported(walked, tmp_path, capsys):
    command, out = walked
    adapted = {name.partition(".lora_")[0].rpartition(".layers.")[2] for name in load_file(out / WEIGHTS)}
    assert {"1.mlp.experts", "1.mlp.experts.base_layer", "1.mlp.shared_experts.up_proj", "0.mlp.up_proj"} <= adapted
    assert json.loads((out / "run.json").read_text())["layout"] == "tree"

    assert main([*command, "--lora_experts", "--output_dir", str(tmp_path / "a"), "--max_steps", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "experts.down_proj (1), experts.gate_up_proj (1)" in printed
    assert "--lora_dropout 0.1 does not apply to the experts" in printed
    assert "stay frozen" not in printed
    assert main([*command, "--output_dir", str(tmp_path / "b"), "--max_steps", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "The experts stay frozen: 12 % of the weights; --lora_experts adapts them." in printed
    assert printed.count("not adapted by PEFT in this architecture") == 1, "several names, one reason"
    assert "These stay frozen (not adapted by PEFT in this architecture): gate_proj, up_proj, down_proj (" in printed


def test_a_resumed_run_gives_the_same_adapter(walked, tmp_path):
    command, whole = walked
    out = tmp_path / "out"
    shutil.copytree(whole / "checkpoint-3", out / "checkpoint-3")
    assert main([*command, "--lora_experts", "--output_dir", str(out), "--resume"]) == 0
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_recomputed_activations_give_the_same_losses(walked, tmp_path):
    command, whole = walked
    more = ["--lora_experts", "--gradient_checkpointing", "true", "--output_dir", str(tmp_path / "out")]
    assert main([*command, *more]) == 0
    ours, theirs = (
        json.loads((folder / "run.json").read_text())["loss_history"] for folder in (tmp_path / "out", whole)
    )
    assert ours == theirs


def test_verify_passes_and_the_merged_model_answers_like_the_adapter(walked, tmp_path, capsys):
    command, out = walked
    assert main(["verify", *command[1:7], "--lora_experts"]) == 0
    merged = tmp_path / "merged"
    assert main(["merge", "--adapter_path", str(out), "--output_dir", str(merged)]) == 0
    answers = []
    for folder in (out, merged):
        capsys.readouterr()
        chat = ["--prompt", "晚安", "--max_new_tokens", "8", "--dtype", "float32"]
        assert main(["chat", "--adapter_path", str(folder), *chat]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_a_base_without_experts_is_refused_before_it_is_loaded(models, walked, tmp_path, capsys):
    command = [*walked[0], "--lora_experts", "--model_path", str(models("llama")), "--output_dir", str(tmp_path / "o")]
    assert main([word for i, word in enumerate(command) if i not in (1, 2)]) == 2
    captured = capsys.readouterr()
    assert "--lora_experts: this model has no experts" in captured.err
    assert "loading" not in captured.out
