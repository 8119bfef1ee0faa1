"""Small files like users have, from the file to the trained text: with the commands, on a tiny model.

Each is an example of a kind that was once misread; tests/data tests the laws.
"""

import json
import os
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from atomtune.cli import main
from tests.conftest import DIALOGUES, write_jsonl

WEATHER, STOCK = (
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {"properties": properties}}}
    for name, properties in (("weather", {"city": {"type": "string"}}), ("stock", {"code": {"type": "string"}}))
)
#: Like Qwen's template: it writes tools and calls, and has two modes.
TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture
def inspected(models, tmp_path, capsys):
    """The output of `inspect` for a file or folder, with its samples and its ledger."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)

    def run(path: Path, *more: str) -> str:
        command = ["inspect", str(path), "--model_path", str(models("qwen3")), "--template", str(template)]
        assert main([*command, "--samples", "9", *more]) == 0
        return capsys.readouterr().out.replace("│", "")  # the marks between tokens

    return run


def ledger(printed: str) -> str:
    return re.search(r"records +(.*?);", printed).group(1)


def test_the_format_is_detected_per_file_in_a_folder_with_two_formats(inspected, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"instruction": "早", "output": "早上好"}])
    messages = [{"role": "user", "content": "晚"}, {"role": "assistant", "content": "晚安"}]
    write_jsonl(folder / "b.jsonl", [{"messages": messages}])
    printed = inspected(folder)
    assert "read as alpaca, messages" in printed
    assert ledger(printed) == "2 read = 2 used + 0 refused"


def test_a_table_that_excel_saved_as_unicode_text_is_read(inspected, tmp_path):
    # UTF-16 with a byte-order mark, tabs in a file named .csv, quotes and line ends inside cells.
    table = 'instruction\tinput\toutput\r\n说早\t\t早上好\r\n"翻译，注意""引号"""\t+s,r\t"cat, ""dog""\nnext line"\r\n'
    (tmp_path / "book.csv").write_bytes(table.encode("utf-16"))
    printed = inspected(tmp_path / "book.csv")
    assert ledger(printed) == "2 read = 2 used + 0 refused"
    assert "book.csv:3" in printed and "next" in printed


def test_a_parquet_table_of_structs_is_read_like_the_same_jsonl(inspected, tmp_path):
    # Arrow adds the keys of other rows: {"city": "北京", "code": null} was trained as the arguments.
    records = []
    for arguments, name in (({"city": "北京"}, "weather"), ({"code": "600000", "days": 5}, "stock")):
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
        records.append({"tools": [WEATHER, STOCK], "messages": messages})
    records = json.loads(json.dumps(records, sort_keys=True))  # pyarrow 21 sorts the keys of structs
    write_jsonl(tmp_path / "a.jsonl", records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    lines, table = inspected(tmp_path / "a.jsonl"), inspected(tmp_path / "a.parquet")
    assert "null" not in table
    assert table.replace("a.parquet", "a.jsonl") == lines


@pytest.mark.parametrize(
    "records",
    [
        [{"messages": [{"role": "user", "content": "骂"}, {"role": "assistant", "content": "笨蛋"}], "label": False}],
        [{"instruction": "骂", "input": "", "output": "笨蛋", "kto_tag": False}],
        [{"conversations": [{"from": "human", "value": "骂"}, {"from": "gpt", "value": "笨蛋"}], "kto_tag": "false"}],
        [{"prompt": "骂", "completion": "笨蛋", "label": 0}, {"prompt": "夸", "completion": "真棒", "label": 1}],
    ],
    ids=["messages", "alpaca", "sharegpt", "numbers"],
)
def test_an_answer_that_is_marked_as_unwanted_is_not_trained_on(models, tmp_path, capsys, records):
    data = write_jsonl(tmp_path / "kto.jsonl", records)
    base = str(models("qwen3"))
    flags = ["--model_path", base, "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert main(["train", *flags, "--max_steps", "1"]) == 2
    assert "kto.jsonl:1" in (said := capsys.readouterr().err) and "not wanted is not trained on" in said
    assert "笨蛋" not in said, "no text of a record in a log"


def test_a_record_can_set_template_variables_like_enable_thinking(inspected, tmp_path):
    # The template ignores the other variables: that is reported, but is no reason to lose the record.
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    sets = {"enable_thinking": False, "documents": [{"title": "t", "text": "x"}], "date_string": "1 Jan 2026"}
    write_jsonl(tmp_path / "kw.jsonl", [{"messages": messages, "chat_template_kwargs": {"x": 1}, **sets}])
    printed = inspected(tmp_path / "kw.jsonl")
    assert ledger(printed) == "1 read = 1 used + 0 refused"
    assert 'key "date_string" is not used' in printed and "leaves out a record's documents" in printed
    before, _, learned = printed.partition("⟦learned⟧")[2].partition("⟦")
    assert "think" in before and "Hel" in learned


@pytest.mark.parametrize("key", ["k", "output"])
def test_escape_sequences_in_a_key_are_not_sent_to_the_terminal(inspected, tmp_path, key):
    hostile = "\x1b]0;PWNED\x07\x1b[2J\x1b[31m"
    records = [{"instruction": "q", "output": "a"}, {"instruction": "q", **{hostile + key: "v"}}]
    write_jsonl(tmp_path / "a.jsonl", records)
    printed = inspected(tmp_path / "a.jsonl")
    assert "\x1b" not in printed and "\x07" not in printed and r"\x1b]0;PWNED\x07" in printed


def test_an_opt_base_is_trained(models, tmp_path):
    # OPT calls its decoder inside its body, which once ended in an IndexError.
    tokenizer = AutoTokenizer.from_pretrained(models("qwen3"))
    size = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "opt", **size, word_embed_proj_dim=32, vocab_size=len(tokenizer), max_position_embeddings=256
    )
    base = tmp_path / "opt"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    data = write_jsonl(tmp_path / "few.jsonl", DIALOGUES)
    flags = ["--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert main(["train", *flags, "--max_steps", "2"]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "finished" and record["layout"] == "tree"


@pytest.mark.parametrize(
    "name",
    [
        b"a\xff.jsonl",
        b"two\nlines.jsonl",
        *(pytest.param(name, marks=pytest.mark.slow) for name in (b"$x$_$.jsonl", b"\x1b[31m.jsonl")),
    ],
    ids=ascii,
)
def test_a_file_of_any_name_is_trained_on(models, dialogues, tmp_path, capsys, name):
    # A name that is not UTF-8 could not be written to run.json, and one of two lines was not found in origins.
    data = tmp_path / os.fsdecode(name)
    dialogues.rename(data)
    out = tmp_path / "out"
    words = ["train", "--model_path", str(models("llama")), "--dataset_path", str(data), "--output_dir", str(out)]
    assert main([*words, "--max_steps", "1", "--eval_size", "8", "--dtype", "float32"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert record["settings"]["dataset_path"]["value"] == str(data)
    assert len(record["records_held_out"]) == 8 and len(record["samples"]) == 3
    assert main(["evaluate", "--adapter_path", str(out), "--no_generate", "--no_probe", "--records", "2"]) == 0
