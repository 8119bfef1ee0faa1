"""Token rows: a base whose tokenizer has more tokens than its embedding has rows."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from atomtune.cli import main
from tests.conftest import write_jsonl
from tests.tiny import build

RECORDS = [{"instruction": "说早", "output": "早上好"}, {"instruction": "say lumen", "output": "lumen"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base beside a tokenizer with one word more than it can read."""
    folder = build("gpt2", tmp_path_factory.mktemp("base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["lumen"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flags", [[], ["--verify", "true"], ["--streaming", "true"]])
def test_a_record_with_such_a_token_is_refused_by_name(base, tmp_path, capsys, flags):
    data = write_jsonl(tmp_path / "train.jsonl", RECORDS)
    command = ["train", "--dataset_path", str(data), "--model_path", str(base), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--max_steps", "1", *flags]) == 2
    message = capsys.readouterr().err
    assert "the token lumen, for which the model has no embedding" in message
    assert ("train.jsonl:2" in message) == (flags != ["--streaming", "true"]), "a stream is read batch by batch"
    assert "resize_token_embeddings" in message


def test_verify_and_evaluate_refuse_it_too(base, tmp_path, capsys):
    data = write_jsonl(tmp_path / "train.jsonl", RECORDS)
    for command in (["verify"], ["evaluate", "--output_dir", str(tmp_path / "report")]):
        assert main([*command, "--dataset_path", str(data), "--model_path", str(base)]) == 2
        assert "the token lumen, for which the model has no embedding" in capsys.readouterr().err


def test_where_no_text_has_such_a_token_the_base_works_and_it_is_said(base, tmp_path, capsys):
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
