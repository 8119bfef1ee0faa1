"""Token rows: the tokenizer of a base has more tokens than its embedding has rows."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from atomtune.cli import main
from atomtune.model.adapter import load_trained
from atomtune.model.adapter_folder import template_of
from atomtune.model.generate import prompt_ids
from atomtune.model.token_rows import looks_untrained, say_untrained_stop
from tests.conftest import write_jsonl
from tests.tiny import build
from tests.trained import train_by_heart

RECORDS = [{"instruction": "说早", "output": "早上好"}, {"instruction": "say lumen", "output": "lumen"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base whose tokenizer has one word more than its embedding."""
    folder = build("gpt2", tmp_path_factory.mktemp("base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["lumen"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flags", [[], ["--verify", "true"], ["--streaming", "true"]])
def test_a_record_with_a_token_without_embedding_is_refused_by_name(base, tmp_path, capsys, flags):
    data = write_jsonl(tmp_path / "train.jsonl", RECORDS)
    command = ["train", "--dataset_path", str(data), "--model_path", str(base), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--max_steps", "1", *flags]) == 2
    message = capsys.readouterr().err
    assert "the token lumen, for which the model has no embedding" in message
    assert ("train.jsonl:2" in message) == (flags != ["--streaming", "true"]), "a stream is read batch by batch"
    assert "resize_token_embeddings" in message


def test_verify_and_evaluate_refuse_a_token_without_embedding(base, tmp_path, capsys):
    data = write_jsonl(tmp_path / "train.jsonl", RECORDS)
    for command in (["verify"], ["evaluate", "--output_dir", str(tmp_path / "report")]):
        assert main([*command, "--dataset_path", str(data), "--model_path", str(base)]) == 2
        assert "the token lumen, for which the model has no embedding" in capsys.readouterr().err


def test_an_unused_token_without_embedding_is_reported_but_not_refused(base, tmp_path, capsys):
    data, out = write_jsonl(tmp_path / "train.jsonl", RECORDS[:1]), tmp_path / "out"
    command = ["train", "--dataset_path", str(data), "--model_path", str(base), "--output_dir", str(out)]
    assert main([*command, "--max_steps", "1"]) == 0
    streams = capsys.readouterr()
    assert "has the token lumen, for which the model has no embedding; unused here" in streams.out + streams.err
    chat = ["chat", "--adapter_path", str(out), "--max_new_tokens", "2"]
    assert main([*chat, "--prompt", "说早"]) == 0
    capsys.readouterr()
    assert main([*chat, "--prompt", "lumen"]) == 2
    assert "The text has the token lumen" in capsys.readouterr().err


def test_a_pad_token_without_an_embedding_row_does_not_break_padding(tmp_path, capsys):
    # The most frequent token without a row. Padding is masked by position, so the model never reads it.
    folder = build("llama", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token_id == AutoModelForCausalLM.from_pretrained(folder).config.vocab_size
    records = [{"instruction": "说早", "output": "早"}, {"instruction": "请你说早上好", "output": "早上好"}]
    data = write_jsonl(tmp_path / "train.jsonl", records)
    flags = ["--dataset_path", str(data), "--model_path", str(folder)]
    train = ["train", *flags, "--output_dir", str(tmp_path / "out"), "--layout", "padded", "--max_steps", "1"]
    assert main([*train, "--per_device_train_batch_size", "2"]) == 0
    assert main(["evaluate", *flags, "--output_dir", str(tmp_path / "report"), "--max_new_tokens", "2"]) == 0


def with_equal_rows(folder: Path, *, tied: bool = False) -> tuple[int, int]:
    """Copy the rows of another token to a base's stop token; returns the ids of both."""
    build("qwen3", folder, tie_word_embeddings=tied)
    stop, other = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            matrix[stop] = matrix[other]
    model.save_pretrained(folder)
    return stop, other


@pytest.mark.slow
@pytest.mark.parametrize(("targets", "stops"), [("all-linear", False), ("all-linear,lm_head", True)])
def test_an_untrained_stop_token_is_learned_only_with_lora_on_lm_head(tmp_path, capsys, targets, stops):
    # The remedy in the notice. Two equal rows have equal logits, whatever LoRA changes in the layers before.
    stop, other = with_equal_rows(tmp_path / "base")
    out = train_by_heart(tmp_path / "base", tmp_path, RECORDS[:1], "--lora_targets", targets)
    streams = capsys.readouterr()
    notice = " ".join((streams.out + streams.err).split())
    assert ("Options: train the output matrix too (--lora_targets all-linear,lm_head)" in notice) != stops
    template, _ = template_of(out, trust_remote_code=False)
    ids = prompt_ids(template, [{"role": "user", "content": "说早"}])
    ids += template.tokenizer("早上好", add_special_tokens=False)["input_ids"]
    model = load_trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), out)
    logits = model(torch.tensor([ids])).logits[0, -1]
    assert (int(logits.argmax()) == stop and logits[stop] > logits[other] + 1) == stops
    assert logits[stop] == logits[other] or stops
    assert all("lora_" in name for name in load_file(out / "adapter_model.safetensors")), "nothing of the base"
    assert main(["merge", "--adapter_path", str(out), "--output_dir", str(tmp_path / "merged")]) == 0


def test_the_untrained_stop_token_notice_omits_lm_head_for_tied_embeddings(tmp_path, capsys):
    with_equal_rows(tmp_path / "base", tied=True)
    train_by_heart(tmp_path / "base", tmp_path, RECORDS[:1], steps=1)
    streams = capsys.readouterr()
    notice = " ".join((streams.out + streams.err).split())
    assert "Options: start from the instruct model of this family" in notice


@pytest.mark.parametrize("rows", ["those of others", "zero", "trained"])
def test_an_untrained_stop_token_is_reported_before_training(tmp_path, capsys, rows):
    # Catches a base whose stop token has one of many equal rows: it never learned to stop, and no message said so.
    folder = build("qwen3", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    stop, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    if rows != "trained":
        with torch.no_grad():
            for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                matrix[stop] = 0 if rows == "zero" else matrix[other] * 1.001
        model.save_pretrained(folder)
    data = write_jsonl(tmp_path / "train.jsonl", RECORDS[:1])
    flags = ["--model_path", str(folder), "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    assert main(["train", "--dataset_path", str(data), *flags]) == 0
    streams = capsys.readouterr()
    said = streams.out + streams.err
    assert ("the stop token <|im_end|> looks untrained" in " ".join(said.split())) == (rows != "trained")


@pytest.mark.parametrize("matrix", ["embedding", "output matrix"])
def test_an_untrained_stop_token_is_found_in_either_matrix(models, matrix):
    tokenizer = AutoTokenizer.from_pretrained(models("qwen3"))
    model = AutoModelForCausalLM.from_pretrained(models("qwen3"))
    layer = model.get_input_embeddings() if matrix == "embedding" else model.get_output_embeddings()
    stop, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    layer.weight.data[stop] = layer.weight.data[other]
    said: list[str] = []
    say_untrained_stop(model, tokenizer, "<|im_end|>", notice=said.append)
    assert f"its row of the {matrix} is zero or the same" in said[0]


@pytest.mark.parametrize(("token", "expected"), [("<|im_end|>", False), ("<|endoftext|>", False), ("<gh_stars>", True)])
def test_trained_and_untrained_rows_of_a_real_model_are_distinguished(real, token, expected):
    folder = real("smollm2")
    token_id = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(token)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert looks_untrained(model.get_input_embeddings().weight, token_id) == expected


@pytest.mark.parametrize("token_id", [0, 8_191, 8_192, 19_999])
def test_rows_are_compared_with_all_others_of_a_large_vocabulary(token_id):
    # They are compared in chunks of 8,192 rows, of which one has the row itself.
    weight = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    assert not looks_untrained(weight, token_id)
    weight[12_345] = 1.01 * weight[token_id]
    assert looks_untrained(weight, token_id)
