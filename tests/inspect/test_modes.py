"""Laws of a thinking template's two modes."""

from atomtune.cli import main
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.records import Record, Turn
from atomtune.inspect.modes import examples_by_mode
from tests.conftest import write_jsonl
from tests.tiny import CHATML, tokenizer_of

RECORD = Record((Turn("user", "9*8?"), Turn("assistant", "72")), "a:1", variables={"enable_thinking": True})


def test_each_thinking_mode_has_its_own_prompt_and_answer():
    tokenizer = tokenizer_of("bytes", CHATML)
    thinking, plain = examples_by_mode(load_template("qwen3", tokenizer), RECORD)
    for example, learned, asked in (
        (thinking, "<think>\n\n</think>\n\n72<|im_end|>", "assistant\n"),
        (plain, "72<|im_end|>", "assistant\n<think>\n\n</think>\n\n"),
    ):
        ids = list(zip(example.ids, example.learn, strict=True))
        assert tokenizer.decode([token for token, times in ids if times]) == learned
        assert tokenizer.decode([token for token, times in ids if not times]).endswith(asked)


def test_a_template_without_thinking_has_no_modes():
    assert examples_by_mode(load_template("chatml", tokenizer_of("bytes", CHATML)), RECORD) == ()


def test_inspect_shows_both_modes(models, tmp_path, capsys):
    data = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "9*8?", "output": "72"}] * 3)
    words = ["inspect", str(data), "--model_path", str(models("qwen3")), "--samples", "1"]
    assert main([*words, "--template", "qwen3"]) == 0
    shown = capsys.readouterr().out
    assert "enable_thinking=true" in shown and "enable_thinking=false" in shown
    assert main([*words, "--template", "chatml"]) == 0
    assert "enable_thinking" not in capsys.readouterr().out


def test_both_modes_of_a_record_of_the_second_file_are_shown(models, tmp_path, capsys):
    # The record was looked for in the first file too, which was then said to have changed.
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [{"instruction": "9*8?", "output": "72"}] * 3) for name in "ab"]
    words = ["inspect", *map(str, files), "--model_path", str(models("qwen3")), "--template", "qwen3"]
    shown = set()
    for seed in range(4):
        assert main([*words, "--samples", "1", "--seed", str(seed), "--html", str(tmp_path / f"{seed}.html")]) == 0
        assert (tmp_path / f"{seed}.html").is_file()
        origin = capsys.readouterr().out.partition("The last answer of ")[2].split()[0]
        shown.add(origin.partition(":")[0])
    assert shown == {"a.jsonl", "b.jsonl"}
