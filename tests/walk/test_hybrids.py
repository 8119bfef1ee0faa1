"""Models with linear attention, and with experts and sinks: train as a tree, resume, verify, merge, chat."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atomtune.cli import main
from tests.conftest import DIALOGUES, write_jsonl
from tests.hybrids import write_walked

STEPS = 12
LONG = "You are a patient shopkeeper in an old town. Answer briefly, kindly and in the words of a story. " * 2


@pytest.fixture(scope="module", params=["qwen3_5_text", "gpt_oss"])
def trained(request, tmp_path_factory):
    """(family, base, command without output folder, output folder) of an undisturbed run."""
    folder = tmp_path_factory.mktemp(request.param)
    base = write_walked(request.param, folder / "base")
    records = [{**record, "instruction": LONG, "input": f"{record['instruction']} {n}"} for n, record in numbered()]
    data = write_jsonl(folder / "dialogues.jsonl", records)
    command = ["train", "--model_path", str(base), "--dataset_path", str(data), "--dtype", "float32"]
    command += ["--max_steps", str(STEPS), "--save_steps", "4", "--logging_steps", "1", "--learning_rate", "5e-3"]
    command += ["--per_device_train_batch_size", "4"]
    assert main([*command, "--output_dir", str(folder / "out")]) == 0
    return request.param, base, command, folder / "out"


def numbered():
    return [(n, record) for n in range(3) for record in DIALOGUES]


def test_hybrid_models_train_in_the_tree_layout(trained):
    report = json.loads((trained[3] / "run.json").read_text())
    assert report["layout"] == "tree"
    assert report["tokens_computed"] < 0.7 * report["tokens_padded"]


@pytest.mark.slow
def test_a_killed_and_resumed_run_gives_the_same_adapter_and_losses(trained, tmp_path):
    _, _, command, whole = trained
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(whole / "checkpoint-4", out / "checkpoint-4")
    (out / "run.json").write_text('{"status": "running"}')
    assert main([*command, "--output_dir", str(out), "--resume"]) == 0
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()
    ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (out, whole))
    assert ours["loss_history"] == theirs["loss_history"]


def test_verify_passes_in_the_tree_layout(trained, capsys):
    _, base, command, _ = trained
    data = command[command.index("--dataset_path") + 1]
    assert main(["verify", "--model_path", str(base), "--dataset_path", data, "--dtype", "float32"]) == 0
    report = capsys.readouterr().out
    assert "layout tree" in report


def test_the_merged_model_answers_like_the_adapter(trained, tmp_path, capsys):
    _, base, _, out = trained
    merged = tmp_path / "merged"
    merge = ["merge", "--adapter_path", str(out), "--output_dir", str(merged), "--dtype", "float32"]
    assert main(merge) == 0
    capsys.readouterr()
    chat = ["chat", "--prompt", "你是谁？", "--system", LONG, "--max_new_tokens", "8", "--dtype", "float32"]
    assert main([*chat, "--adapter_path", str(out)]) == 0
    answer = capsys.readouterr().out.strip()

    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    messages = [{"role": "system", "content": LONG}, {"role": "user", "content": "你是谁？"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answered = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    whole = tokenizer.decode(answered[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.rstrip("\ufffd") == whole.rstrip("\ufffd").strip()  # without a character that the limit cut in two
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        assert not torch.allclose(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-3)


@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_batch_size(trained, tmp_path):
    """A row with one record has no other records that could leak into it, and no branch."""
    _, _, command, out = trained
    figures = []
    for size in ("1", "6"):
        folder = tmp_path / size
        evaluate = ["evaluate", "--adapter_path", str(out), "--dtype", "float32", "--output_dir", str(folder)]
        evaluate += ["--dataset_path", command[command.index("--dataset_path") + 1], "--records", "6"]
        more = ["--no_generate", "--no_probe", "--per_device_eval_batch_size", size]
        assert main([*evaluate, *more]) == 0
        figures.append(json.loads((folder / "report.json").read_text())["models"])
    for name, alone in figures[0].items():
        together = figures[1][name]["nats_per_token"][0]
        assert together == pytest.approx(alone["nats_per_token"][0], rel=1e-5)
