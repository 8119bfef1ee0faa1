"""Language: every text has a Chinese translation, filled-in values stay, and a Chinese screen is all Chinese."""

import contextlib
import errno
import io
import json
import os
import re
import sys
from pathlib import Path
from string import Formatter

import pytest
from rich.cells import cell_len

from atomtune.catalogue import Catalogue
from atomtune.cli import COMMANDS, main
from atomtune.console import Console
from atomtune.disk import _DISK_ERRORS, _PLACE_ERRORS, SYSTEM_WORDS
from atomtune.language import LANGUAGES, catalogue, language_of, singular, spoken, translated
from atomtune.settings.help import help_text
from atomtune.settings.read import GROUPS
from atomtune.train.report_page import page
from tests.conftest import write_jsonl
from tools.messages import CATALOGUE, SOURCE, all_messages, messages_of

TRANSLATIONS: dict[str, str | None] = json.loads(CATALOGUE.read_text(encoding="utf-8"))
DEMO_BASE = SOURCE / "demo" / "base"

#: Part of an English sentence: three words in a row without dashes or code marks.
SENTENCE = re.compile(r"(?<![\w/.-])[a-z]{2,} [a-z]{2,} [a-z]{2,}(?![\w=/])", re.IGNORECASE)
FLAG = re.compile(r"--[a-z_]+")
#: No sentences: a command to copy, and a name.
NO_SENTENCE = re.compile(r"^(用法：|  )atomtune .*|Hugging Face hub", re.MULTILINE)


def english_in(screen: str) -> list[str]:
    return SENTENCE.findall(NO_SENTENCE.sub("", screen))


def names_in(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def test_every_message_has_a_translation():
    missing = {text for texts in all_messages().values() for text in texts if text not in TRANSLATIONS}
    assert not missing  # `python -m tools.messages` lists them


def test_no_translation_is_unused():
    in_source = {text for texts in all_messages().values() for text in texts}
    assert not TRANSLATIONS.keys() - in_source  # `python -m tools.messages --sort` drops them


def test_a_text_that_nobody_translated_would_be_found(tmp_path):
    file = tmp_path / "new.py"
    lines = [
        "def f(rows):",
        '    """What it does."""',
        '    say(f"{len(rows):,} rows were lost.")',
        '    x["lora_rank"]',
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert messages_of(file) == ["{rows} rows were lost."]


def test_a_translation_has_the_placeholders_of_its_message():
    for english, chinese in TRANSLATIONS.items():
        assert chinese is None or names_in(chinese) == names_in(english), english


def test_a_translation_has_the_line_ends_and_the_flags_of_its_text():
    # The catalogue once had a real line end where the text shows `\\n`.
    for english, chinese in TRANSLATIONS.items():
        if chinese is not None:
            assert chinese.count("\n") == english.count("\n"), chinese
            assert set(FLAG.findall(english)) <= set(FLAG.findall(chinese)), chinese


def test_every_message_matches_only_its_own_translation():
    """Fill in every text with meaningless words."""
    chinese_catalogue = catalogue("zh")
    for english, chinese in TRANSLATIONS.items():
        if chinese is None:
            continue
        values = {name: f"v{number}a" for number, name in enumerate(sorted(names_in(english)))}
        expected = "".join(literal + values.get(name or "", "") for literal, name, _, _ in Formatter().parse(chinese))
        actual = chinese_catalogue.translated(english.format(**values), is_ours=True)
        assert actual.replace(" ", "") == expected.replace(" ", "")  # spaces next to values: the test below


def test_translations_are_chinese_with_full_width_punctuation():
    """Commands, flags, names and code stay; sentences end with Chinese punctuation."""
    for english, chinese in TRANSLATIONS.items():
        if chinese is not None and len(english.split()) > 4:
            assert re.search("[\u4e00-\u9fff]", chinese), english
            assert not re.search("[\u4e00-\u9fff][,;!?]|[\u4e00-\u9fff][.:]( |$)", chinese), chinese


def test_filled_in_values_are_not_translated():
    """A record, a path or a library may contain the same words as our own messages."""
    own = Catalogue({"no record": "没有记录", "{path}: no such file.": "{path}：没有这个文件。"})
    assert own.translated("no record: no such file.") == "no record：没有这个文件。"


def test_a_message_within_a_message_is_translated():
    own = Catalogue({"{path} cannot be used: {reason}.": "{path} 不能用：{reason!m}。", "no record": "没有记录"})
    assert own.translated("no record cannot be used: no record.") == "no record 不能用：没有记录。"


def test_a_space_stands_between_chinese_and_a_latin_value():
    own = Catalogue({"{place} is {value}; expected text": "{place!m}是{value!m}；应为文本", "the text": "正文"})
    assert own.translated("the text is null; expected text", is_ours=True) == "正文是 null；应为文本"
    assert own.translated("turn 2 is 12; expected text", is_ours=True) == "turn 2 是 12；应为文本"


def test_lines_of_a_list_keep_their_bullets_and_their_indent():
    own = Catalogue(
        {
            "{file} cannot be used:\n{lines}": "{file} 不能用：\n{lines!m}",
            "{place}: found {found}": "{place}：找到的是 {found}",
            "{others} of {prompts} prompts differ": "{prompts} 个提示中有 {others} 个不同",
        }
    )
    assert own.translated("a cannot be used:\n  x: found 5\n  y: found 6") == (
        "a 不能用：\n  x：找到的是 5\n  y：找到的是 6"
    )
    assert own.translated("  - 7 of 10 prompts differ") == "  - 10 个提示中有 7 个不同"


def test_each_line_about_a_record_is_translated_separately():
    """A key followed by another message (for example about an empty text) was taken to include the lines after it."""
    lines = ["a.jsonl:1  output is empty: there is nothing to learn.", 'b.jsonl:2  no key "output"; keys here: x.']
    chinese = ["a.jsonl:1  output 是空的：没有可以学习的内容。", 'b.jsonl:2  没有键 "output"；这里的键有 x。']
    ending, chinese_ending = "2 of 3 records refused.", "3 条记录中有 2 条被拒绝。"
    text = catalogue("zh").translated("\n".join([f"\natomtune train: {lines[0]}", lines[1], ending]))
    assert text.split("\n") == ["", f"atomtune train：{chinese[0]}", chinese[1], chinese_ending]
    text = catalogue("zh").translated(f"atomtune train: {lines[0]}\n{ending}")
    assert text == f"atomtune train：{chinese[0]}\n{chinese_ending}"


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        (
            "a.jsonl:1  instruction is a number; expected text; output is a list; expected text.",
            "a.jsonl:1  instruction 是数；应为文本；output 是列表；应为文本。",
        ),
        (
            'a.jsonl:1  no key "a"; keys here: x, y; no key "b"; keys here: x, y.',
            'a.jsonl:1  没有键 "a"；这里的键有 x, y；没有键 "b"；这里的键有 x, y。',
        ),
        (
            "a.jsonl:1  null; expected an object with prompt and completion.",
            "a.jsonl:1  null；应为带 prompt 和 completion 的对象。",
        ),
        (
            'a.jsonl:1  no key "a"; keys here: x.\n… and 40 more.',
            'a.jsonl:1  没有键 "a"；这里的键有 x。\n……还有 40 项。',
        ),
        (
            "--num_train_epochs 'x': expected a number, more than 0 and at most 1,000,000.",
            "--num_train_epochs 'x'：应为数，大于 0，不超过 1,000,000。",
        ),
        (
            "--lora_rank '8.5': expected a whole number, at least 1 and at most 65,536.",
            "--lora_rank '8.5'：应为整数，大于等于 1，不超过 65,536。",
        ),
    ],
)
def test_all_of_a_message_is_chinese(english, chinese):
    """The first part's field matched the parts after it as well, which then stayed English."""
    assert catalogue("zh").translated(english) == chinese


def test_foreign_text_is_not_translated():
    text = "Once upon a time there was a lamp; it had 3 records of the sea, and no record is longer than a night."
    assert catalogue("zh").translated(text) == text


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({}, "en"),
        ({"LANG": "C"}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LC_MESSAGES": "zh_TW.UTF-8", "LANG": "en_US.UTF-8"}, "zh"),
        ({"ATOMTUNE_LANGUAGE": "en", "LC_ALL": "zh_CN.UTF-8"}, "en"),
        ({"ATOMTUNE_LANGUAGE": "zh"}, "zh"),
    ],
)
def test_the_language_is_that_of_the_environment(environment, language):
    assert language_of(environment) == language


def test_english_is_what_is_spoken_unless_another_language_is_chosen():
    assert translated("All settings are the same.") == "All settings are the same."
    with spoken("zh"):
        assert translated("All settings are the same.") == "所有设置都相同。"
    assert translated("All settings are the same.") == "All settings are the same."


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (
            "Training: 1 steps of 1 records, 1 epochs of 21 records.",
            "Training: 1 step of 1 record, 1 epoch of 21 records.",
        ),
        ("1 records are held out; 1 batches tried", "1 record is held out; 1 batch tried"),
        (
            "1 other tensors are copied, 1 adapted matrices end there",
            "1 other tensor is copied, 1 adapted matrix ends there",
        ),
        (
            "1 of 41 evaluation records are repeated; 1 of those used are cut",
            "1 of 41 evaluation records is repeated; 1 of those used is cut",
        ),
        (
            "1 of its tensors are renamed, 1 of these were waiting",
            "1 of its tensors is renamed, 1 of these was waiting",
        ),
        ("1 of 3 greedy answers differ", "1 of 3 greedy answers differs"),
        ("1 prompt tokens cut, 1 such steps were skipped", "1 prompt token cut, 1 such step was skipped"),
        ("activations of 1 of 3 layers are recomputed, 21 of 41 records are", None),
        ("11 records, 2.1 tokens, 0.1 seconds, 1,001 steps, a-1 rows", None),
        ("1 records.jsonl, line 1: records, data/1 records/x, 1 recordsmith", None),
        ("answered in 1 of 2 records", None),
    ],
)
def test_counts_of_one_use_the_singular(text, right):
    assert singular(text) == (right or text)
    assert translated(text) == singular(text)


@pytest.mark.parametrize("words", [["--language", "zh"], ["--language=zh"]])
def test_the_language_flag_switches_messages_to_chinese(words, capsys):
    assert main(["train", *words, "--lora_rank", "0", "--learning_rat", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "atomtune train：--learning_rat：没有这项设置。是不是想写 --learning_rate？",
        "--lora_rank '0'：应为整数，大于等于 1，不超过 65,536。",
    ]


def test_an_unknown_language_is_refused_with_the_available_ones(capsys):
    assert main(["train", "--language", "fr"]) == 2
    assert capsys.readouterr().err == "atomtune: --language 'fr': expected one of en, zh.\n"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_chinese_and_no_line_is_too_wide(command, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    with spoken("zh"):
        page = help_text(command, COMMANDS[command].summary, GROUPS[command], everything=False)
    assert "示例：" in page
    assert not english_in(page)
    for line in page.splitlines():
        # A word or flag longer than a line stays whole, so that it can be copied.
        assert cell_len(line) <= min(width, 110) or line.lstrip().startswith(("atomtune", "--"))


def test_help_as_data_stays_english(capsys):
    for words in (["--help", "json"], ["train", "--help", "json"]):
        main(words)
        english = capsys.readouterr().out
        main([*words, "--language", "zh"])
        assert capsys.readouterr().out == english


def test_columns_align_with_wide_chinese_characters(capsys):
    """A Chinese character is two cells wide. A name to be typed stays, even if it is a translated word elsewhere."""
    rows = [
        ("eval_size", "auto", "by the width of the base, 96"),
        ("x", "是", "1 epoch"),
        ("refused", "train", "held out"),
    ]
    with spoken("zh"):
        Console().columns(rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["  eval_size  auto   按基座的宽度 96", "  x          是     1 遍", "  refused    train  留出"]


@pytest.fixture(scope="module")
def chinese_run(tmp_path_factory) -> tuple[str, Path]:
    """The output of `atomtune train` in a Chinese locale, and its folder: a short run with held-out records."""
    folder = tmp_path_factory.mktemp("chinese")
    records = [{"instruction": f"第{n}盏灯在哪里？", "input": "", "output": f"在第{n * 7 % 40}层。"} for n in range(40)]
    data = write_jsonl(folder / "lamps.jsonl", [*records, records[0]])
    words = ["--model_path", str(DEMO_BASE), "--dataset_path", str(data), "--lr", "1e-3", "--num_train_epochs", "1"]
    words += ["--output_dir", str(folder / "out"), "--fp16", "--eval_size", "8"]
    screen = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as environment,
        spoken("en"),
        contextlib.redirect_stdout(screen),
        contextlib.redirect_stderr(screen),
    ):
        environment.delenv("ATOMTUNE_LANGUAGE")
        environment.setenv("LC_ALL", "zh_CN.UTF-8")
        assert main(["train", *words]) == 0
    return screen.getvalue(), folder / "out"


def test_a_run_in_a_chinese_locale_speaks_chinese(chinese_run):
    screen, _ = chinese_run
    # The samples are the model's words, and the demo's base may answer in English.
    ours = re.sub("训练数据里没有的提示.*完成：", "", screen, flags=re.DOTALL)
    assert not english_in(ours)
    for part in (
        "读入 41 条记录",
        "注意：与前面完全相同的记录：1 条",
        "留出 8 条记录",
        "训练前",
        "完成：",
        "接下来：",
    ):
        assert part in screen


def test_the_page_of_a_chinese_run_is_chinese(chinese_run):
    _, folder = chinese_run
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert '<html lang="zh">' in page
    words = re.sub("<(style|pre)>.*?</(style|pre)>|<div class=.record.>.*?</section>", "", page, flags=re.DOTALL)
    words = re.sub("<th>[a-z0-9_]+</th>", "", words)  # names of settings
    assert not english_in(re.sub("<[^>]*>", "\n", words))
    for part in ("留出集损失", "没有参加训练的提示", "读入的记录", "计算量"):
        assert part in words


def test_the_reason_of_a_value_is_chinese_on_the_page(chinese_run):
    """`auto: the largest; --max_steps sets …` was matched by `{kind} of {number}`, whose Chinese has another order."""
    _, folder = chinese_run
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    record["settings"]["learning_rate"]["source"] = "auto: the largest; --max_steps sets the number of steps"
    with spoken("zh"):
        assert "<td>auto: 取最大值；步数由 --max_steps 决定</td>" in page(record, title="", image="", commands=[])


def test_the_files_of_a_chinese_run_are_english(chinese_run):
    _, folder = chinese_run
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    sentences = [*record["notices"], *record["outcome"]["sentences"]]
    assert sentences
    assert not [sentence for sentence in sentences if re.search("[\u4e00-\u9fff]", sentence)]


def test_errors_about_data_are_chinese(tmp_path, capsys):
    records = [
        {"instruction": "你是谁？", "output": "灯。"},
        {"instruction": "你是谁？"},
        {"instruction": 1, "output": "灯。"},
    ]
    data = write_jsonl(tmp_path / "bad.jsonl", records)
    words = ["--model_path", str(DEMO_BASE), "--output_dir", str(tmp_path / "out"), "--language", "zh"]
    assert main(["train", "--dataset_path", str(data), *words]) == 2
    assert main(["train", "--dataset_path", str(tmp_path / "none.jsonl"), *words]) == 2
    said = capsys.readouterr().err
    assert not english_in(said)
    assert 'bad.jsonl:2  没有键 "output"；这里的键有 instruction。\n' in said
    assert "run.json 列出了全部。\n3 条记录中有 2 条被拒绝。--skip_bad 用其余 1 条训练。" in said
    assert f"{tmp_path / 'none.jsonl'}：没有这个文件。用 --dataset_path 传数据文件。" in said


@pytest.mark.parametrize(
    ("name", "text"), [("shop.csv", "用户,客服\n在吗,在的\n"), ("shop.json", '[{"text": "在的"}]')]
)
def test_the_advice_about_a_table_or_an_array_in_gbk_is_chinese(tmp_path, capsys, name, text):
    data = tmp_path / name
    data.write_bytes(text.encode("gbk"))
    assert main(["inspect", str(data), "--model_path", str(DEMO_BASE), "--language", "zh"]) == 2
    said = capsys.readouterr().err
    assert "可能是 GBK：在编辑器里另存为 UTF-8，或者运行 iconv -f GB18030 -t UTF-8 OLD > NEW。" in said


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other words")
def test_operating_system_errors_are_translated_to_chinese():
    """“写不到那里：No such file or directory” told only half to users who read no English."""
    codes = {errno.ENOENT, errno.EADDRINUSE, *_DISK_ERRORS, *_PLACE_ERRORS}
    assert {os.strerror(code) for code in codes} <= set(SYSTEM_WORDS)
    with spoken("zh"):
        for words in SYSTEM_WORDS:
            said = translated(f"/x/图.png cannot be written: {words}.")
            assert said.startswith("/x/图.png 写不进去：") and words not in said
        assert translated("/x: Not a directory. Use another path, or fix what is there.") == (
            "/x：不是文件夹。请换一个位置，或者改动那里的东西。"
        )


def test_inspect_and_plan_are_chinese(tmp_path, capsys):
    records = [
        {"instruction": f"第{n}盏灯在哪里？", "input": "", "output": "在山上。" if n else " "} for n in range(20)
    ]
    data = str(write_jsonl(tmp_path / "lamps.jsonl", [*records, records[1]]))
    both = ["--model_path", str(DEMO_BASE), "--language", "zh"]
    assert main(["inspect", data, *both, "--html", str(tmp_path / "page.html")]) == 0
    assert main(["plan", "--dataset_path", data, *both, "--skip_bad"]) == 0
    said = capsys.readouterr().out
    assert '<html lang="zh" data-lang="zh">' in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "记录与词元" in said
    assert "显存" in said or "内存" in said
    assert not english_in(said)


def test_a_message_that_begins_with_a_value_does_not_take_the_command_for_it():
    """“atomtune train: out 里已经有一次训练”: the half-width colon showed that the command was part of the folder."""
    chinese = catalogue("zh")
    text = "\natomtune train: out already holds a run. --resume continues it; another --output_dir starts a new one."
    assert chinese.translated(text).startswith("\natomtune train：out 里已经有一次训练。")
    text = "atomtune train: this is a bug in atomtune 0.1.0. Please report the lines above."
    assert chinese.translated(text).startswith("atomtune train：这是 atomtune 0.1.0 的缺陷。")
    assert chinese.translated("atomtune train: stopped by a signal.") == "atomtune train：收到信号，已停止。"


def test_a_short_line_of_inspect_is_chinese(capsys):
    # Regression: "or: 64, 2 条更长": a key of few letters, printed without `translated`.
    assert (
        main(["inspect", str(DEMO_BASE.parent / "persona.jsonl"), "--model_path", str(DEMO_BASE), "--language", "zh"])
        == 0
    )
    assert "或者：64，2 条更长" in capsys.readouterr().out


def test_languages_are_those_with_a_catalogue():
    assert {"en", *(file.stem for file in CATALOGUE.parent.glob("*.json"))} == set(LANGUAGES)
