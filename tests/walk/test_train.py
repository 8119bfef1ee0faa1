"""A whole training run by the command line; with the tutorial's real data if they are there."""

import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from atomtune.cli import main
from tests.conftest import SHARED_DATA
from tests.tiny import tokenizer_of


def command(base, data, out, *more) -> list[str]:
    return ["train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(out), *more]


def record_of(out) -> dict:
    return json.loads((out / "run.json").read_text())


def test_a_run_writes_all_promised_files_and_figures(models, dialogues, tmp_path):
    out = tmp_path / "out"
    assert main(command(models("llama"), dialogues, out, "--max_steps", "6", "--save_steps", "3")) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja",
                 "run.json", "loss.png", "checkpoint-3", "checkpoint-6"):  # fmt: skip
        assert (out / name).exists(), name
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    record = record_of(out)
    assert record["status"] == "finished"
    assert record["records_read"] == record["records_used"] + len(record["records_refused"]) == 40
    for key in ("prompt_tokens", "target_tokens", "tokens_padded", "tokens_computed", "peak_memory_bytes"):
        assert record[key] > 0, key
    assert record["layout"] == "tree"
    assert record["tokens_computed"] < record["tokens_padded"], "records that begin alike were computed apart"
    assert record["train_loss"] > 0
    assert record["seconds"] > 0
    # 6 steps of 16 on 40 records: 16 + 16 + 8, twice.
    assert record["examples_per_second"] == pytest.approx(80 / record["seconds"])
    assert record["settings"]["max_steps"] == {"value": 6, "source": "--max_steps"}


def test_prompt_and_target_tokens_are_counted_for_one_pass(models, dialogues, tmp_path):
    out = tmp_path / "out"
    assert main(command(models("llama"), dialogues, out, "--max_steps", "1")) == 0
    tokenizer = AutoTokenizer.from_pretrained(models("llama"))
    records = [json.loads(line) for line in dialogues.read_text(encoding="utf-8").splitlines()]
    targets = sum(len(tokenizer(r["output"], add_special_tokens=False)["input_ids"]) + 1 for r in records)
    prompts = [f"<s>Human: {r['instruction']}请回答用户问题: {r['input']}\n</s><s>Assistant:" for r in records]
    prompt_tokens = sum(len(tokenizer(p, add_special_tokens=False)["input_ids"]) for p in prompts)
    assert (record_of(out)["prompt_tokens"], record_of(out)["target_tokens"]) == (prompt_tokens, targets)


@pytest.mark.parametrize("size", [pytest.param("0.1", marks=pytest.mark.slow), "4"])
def test_evaluation_loss_is_averaged_per_target_token_not_per_batch(models, dialogues, tmp_path, size):
    """The evaluation loss is that of plain transformers, one record at a time."""
    out = tmp_path / "out"
    flags = ["--eval_size", size, "--max_steps", "3", "--dtype", "float64", "--per_device_eval_batch_size", "3"]
    assert main(command(models("llama"), dialogues, out, *flags, "--learning_rate", "1e-3")) == 0
    ours = record_of(out)["eval_loss"]

    rows = [json.loads(line) for line in dialogues.read_text(encoding="utf-8").splitlines()]
    held_out = [rows[int(origin.partition(":")[2]) - 1] for origin in record_of(out)["records_held_out"]]
    assert len(held_out) == 4
    tokenizer = AutoTokenizer.from_pretrained(models("llama"))
    base = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float64)
    model = PeftModel.from_pretrained(base, str(out)).eval()
    nats, count = 0.0, 0
    for row in held_out:
        prompt = f"<s>Human: {row['instruction']}请回答用户问题: {row['input']}\n</s><s>Assistant:"
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt_ids) + answer])
        with torch.no_grad():
            nats += model(input_ids=torch.tensor([prompt_ids + answer]), labels=labels).loss.item() * len(answer)
        count += len(answer)
    assert ours == pytest.approx(nats / count, rel=1e-7)  # RMSNorm computes in float32


def test_an_evaluation_file_is_read_like_the_training_file(models, dialogues, tmp_path):
    out = tmp_path / "out"
    flags = ["--eval_path", str(dialogues), "--max_steps", "3", "--eval_strategy", "steps", "--eval_steps", "1"]
    best = ["--load_best_model_at_end", "--save_strategy", "steps", "--save_steps", "1"]
    assert main(command(models("llama"), dialogues, out, *flags, *best)) == 0
    assert record_of(out)["eval_loss"] > 0


def test_records_that_are_evaluated_and_trained_do_not_show_whether_a_run_worked(models, dialogues, tmp_path, capsys):
    # It said "It worked", above three of its training records as "Prompts that are not in the training data".
    out = tmp_path / "out"
    flags = ["--eval_path", str(dialogues), "--max_steps", "8", "--learning_rate", "0.02"]
    assert main(command(models("llama"), dialogues, out, *flags)) == 0
    assert record_of(out)["outcome"]["verdict"] == "untold" and not record_of(out)["samples"]
    said = capsys.readouterr().out
    assert "Most records of --eval_path are nearly the same as training records" in said
    assert "not in the training data" not in said


def test_tensorboard_gets_the_curve(models, dialogues, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    flags = ["--max_steps", "2", "--report_to", "tensorboard", "--logging_steps", "1"]
    assert main(command(models("llama"), dialogues, tmp_path / "out", *flags)) == 0
    assert list((tmp_path / "board").rglob("events.out*"))


@pytest.mark.parametrize("flag", ["--fp16", "--bf16"])
def test_half_precision_flags_train_on_a_cpu(models, dialogues, tmp_path, flag):
    out = tmp_path / "out"
    assert main(command(models("llama"), dialogues, out, "--max_steps", "2", flag)) == 0
    record = record_of(out)
    assert record["status"] == "finished"
    assert len([notice for notice in record["notices"] if flag in notice]) <= 1, "what becomes of the flag is said once"


def test_gradient_checkpointing_gives_the_same_adapter(models, dialogues, tmp_path):
    from safetensors.torch import load_file

    flags = ["--max_steps", "3", "--dtype", "float64", "--lora_dropout", "0", "--learning_rate", "1e-2"]
    for kept in ("true", "false"):
        out = tmp_path / kept
        assert main(command(models("llama"), dialogues, out, *flags, "--gradient_checkpointing", kept)) == 0
    ours, theirs = (load_file(tmp_path / kept / "adapter_model.safetensors") for kept in ("true", "false"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_label_smoothing_and_a_scheduler_of_the_library_pass_through(models, dialogues, tmp_path):
    flags = ["--label_smoothing_factor", "0.1", "--lr_scheduler_type", "cosine", "--warmup_steps", "0.1"]
    assert main(command(models("llama"), dialogues, tmp_path / "out", "--max_steps", "3", *flags)) == 0
    plain = main(command(models("llama"), dialogues, tmp_path / "plain", "--max_steps", "3", *flags[2:]))
    assert plain == 0
    assert record_of(tmp_path / "out")["train_loss"] != record_of(tmp_path / "plain")["train_loss"]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.is_file(), reason=f"the real data set is not at {SHARED_DATA}")
def test_the_tutorials_dataset_trains_with_the_tutorials_flags(tmp_path, capsys):
    """3,729 records, one epoch, an Atom-shaped model of about 2M weights: counts add up and the loss falls."""
    base = tmp_path / "base"
    tokenizer = _trained_on(SHARED_DATA)
    tokenizer.save_pretrained(base)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        initializer_range=0.1,  # a frozen random output matrix of the usual 0.02 would bound how far the loss can fall
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    model.save_pretrained(base)
    out = tmp_path / "out"
    flags = ["--lora_rank", "8", "--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1"]
    flags += ["--num_train_epochs", "1", "--save_steps", "40000", "--save_total_limit", "3", "--learning_rate", "1e-3"]
    flags += ["--fp16", "--remove_unused_columns", "false", "--logging_steps", "10"]
    assert main(command(base, SHARED_DATA, out, *flags)) == 0
    record = record_of(out)
    assert record["records_read"] == record["records_used"] == 3729
    held_out = len(record["records_held_out"])
    assert 0 < held_out <= 0.1 * 3729
    assert record["steps"] == math.ceil((3729 - held_out) / 16)
    losses = [entry["loss"] for entry in record["loss_history"]]
    assert losses[-1] < losses[0] - 0.5

    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(out)
    ).eval()
    saved = AutoTokenizer.from_pretrained(out)
    ids = saved.apply_chat_template(
        [{"role": "user", "content": "娘娘。"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    made = adapted.generate(input_ids=ids, max_new_tokens=16, do_sample=False, eos_token_id=2, pad_token_id=0)
    expected = saved.decode(made[0, ids.shape[1] :], skip_special_tokens=True).rstrip("\ufffd")  # cut by the limit
    capsys.readouterr()
    chat = ["chat", "--adapter_path", str(out), "--prompt", "娘娘。", "--max_new_tokens", "16", "--dtype", "float32"]
    assert main(chat) == 0
    assert capsys.readouterr().out.strip() == expected.strip()


def _trained_on(path):
    """A Llama-style tokenizer trained on the data set itself."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return tokenizer_of("sentencepiece", corpus=[row[key] for row in rows for key in ("instruction", "output")])
