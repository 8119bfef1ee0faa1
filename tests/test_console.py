"""The console: no outside text controls the terminal, and lines break between words at any width."""

import io
import itertools
import json
import os
import pty
import subprocess
import sys
import textwrap

import pytest
from rich.table import Table

from atomtune.cli import main
from atomtune.console import Console, controls_shown, print_json, progress_bar, wrapped
from tests.conftest import write_jsonl

#: Set the window's title, clear the screen, change the colour, the same in C1's one-character form, reverse the text.
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202ekey\r\u2066"
ORDERS = [chr(n) for n in (*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x200E, 0x202A, 0x202E, 0x2066, 0x2069)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def console(width: int, *, terminal: bool = True) -> Console:
    made = Console()
    made.file = Terminal() if terminal else io.StringIO()
    made.width = width
    return made


def test_control_characters_are_escaped_and_all_others_kept():
    assert controls_shown("\x00\x1b\x7f\x9b\u202e\r") == r"\x00\x1b\x7f\x9b\u202e\r"
    for order in ORDERS:
        assert controls_shown(f"a{order}b").isprintable()
    texts = "\ttab, line\nend, 灯塔, é, שלום, 👩‍🔬, [red], :smile:"
    assert controls_shown(texts) == texts


@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_in_text_notices_tables_and_bars_are_escaped(terminal):
    spoken = console(100, terminal=terminal)
    spoken.say(f"{EVIL} [red]x[/red] :smile:")
    spoken.notice(EVIL)
    spoken.print(f"plain {EVIL}")
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    spoken.print(table)
    bar = progress_bar(spoken, "{task.fields[rate]}")
    bar.add_task(EVIL, total=3, rate=EVIL)
    spoken.print(bar)
    out = spoken.file.getvalue()
    assert not [order for order in ORDERS if order in out]
    assert "[red]x[/red] :smile:" in out
    assert "\\x1b[2J" in out


def test_printed_json_keeps_its_value_with_control_characters_escaped(capsys):
    value = {EVIL: [EVIL, "灯", "\n"], "n": 1.5}
    print_json(value)
    line = capsys.readouterr().out
    assert json.loads(line) == value
    assert not [order for order in ORDERS if order in line]


SENTENCE = (
    "train.jsonl:17  turn 2 says role; expected system, user, assistant or tool.\n"
    "    Rename it, or pass --roles bot=assistant. 今天有雾，看不见对岸；晚安，愿你好梦（真的）。 "
    "/a/path/that/is/longer/than/any/narrow/terminal/and/should/be/copied.jsonl is where it was."
)


@pytest.mark.parametrize("width", [20, 33, 40, 80, 120])
def test_lines_wrap_only_between_words_or_chinese_characters(width):
    for line in SENTENCE.split("\n"):
        parts = wrapped(line, width).split("\n")
        # Nothing is lost, and lines break only at a space or a Chinese character.
        assert "".join("".join(parts).split()) == "".join(line.split())
        words = {word for part in parts for word in part.split()}
        for word in ("assistant", "expected", "bot=assistant.", "copied.jsonl"):
            if word in line:
                assert any(word in shown for shown in words)
        assert not any(part.strip()[:1] in "，；。）" for part in parts if part.strip())
        indent = len(line) - len(line.lstrip())
        assert all(part.startswith(" " * indent) for part in parts)
    # Pure English is wrapped like by the standard library.
    english = "The adapter lies in this folder and every figure of the run stands in run.json beside it."
    assert wrapped(english, width).split("\n") == textwrap.wrap(english, width)


def test_a_pipe_and_a_command_to_copy_get_whole_lines():
    long = " ".join(["word"] * 50)
    piped = console(40, terminal=False)
    piped.say(long)
    assert piped.file.getvalue() == long + "\n"
    spoken = console(40)
    spoken.say(long, wrap=False)
    assert spoken.file.getvalue() == long + "\n"
    spoken.say(long)
    assert max(map(len, spoken.file.getvalue().splitlines()[1:])) <= 40
    command = "  atomtune train --model_path a-model --dataset_path some-records.jsonl --output_dir out --resume"
    spoken.say(f"To continue from there:\n{command}")
    assert spoken.file.getvalue().endswith(f"\n{command}\n")


def test_no_command_prints_control_characters_from_data_or_file_names(models, tmp_path, capsys):
    base = str(models("llama"))
    capsys.readouterr()  # drop the library's progress bars from the creation of the base
    name = tmp_path / f"d{EVIL}.jsonl"
    records = [{"instruction": "q", "output": "a", EVIL: "v"}, {"instruction": "q", EVIL: "a"}, {EVIL: 1}]
    turns = [{"role": EVIL, "content": "q"}, {"role": "assistant", "content": "a"}]
    commands = [
        ["inspect", str(write_jsonl(name, records)), "--model_path", base, "--samples", "2"],
        ["inspect", str(name), "--model_path", base, "--json"],
        ["train", "--dataset_path", str(name), "--model_path", base, "--output_dir", str(tmp_path / "out")],
        ["inspect", str(write_jsonl(tmp_path / "roles.jsonl", [{"messages": turns}])), "--model_path", base],
        ["inspect", str(tmp_path / f"absent{EVIL}.jsonl"), "--model_path", base],
        ["inspect", str(name), "--model_path", str(tmp_path / EVIL)],
        ["inspect", str(name), "--model_path", base, "--keys", f"{EVIL}=nothing"],
        ["train", f"--{EVIL}", "1"],
        ["train", str(tmp_path / f"{EVIL}.yaml")],
        ["chat", "--adapter_path", str(tmp_path / EVIL)],
        [EVIL],
    ]
    for command in commands:
        code = main(command)
        captured = capsys.readouterr()
        assert code in (0, 2), captured.err
        shown = captured.out + captured.err
        assert not [order for order in ORDERS if order in shown], (command, shown)


@pytest.mark.slow
def test_a_real_terminal_receives_no_control_characters_from_data(models, tmp_path):
    data = write_jsonl(tmp_path / f"d{EVIL}.jsonl", [{"instruction": "q", "output": "a", EVIL: "v"}, {EVIL: 1}])
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "atomtune", "inspect", str(data), "--model_path", str(models("llama"))]
    environment = {**os.environ, "COLUMNS": "60", "TERM": "xterm-256color", "NO_COLOR": "1"}
    with subprocess.Popen(
        [*command, "--samples", "1"], stdin=child, stdout=child, stderr=child, env=environment
    ) as process:
        os.close(child)
        shown = b"".join(itertools.takewhile(bool, iter(lambda: _read(parent), None))).decode()
    os.close(parent)
    assert process.returncode == 0, shown
    assert "\x1b]0;" not in shown and "\x1b[2J" not in shown and "\x9b" not in shown and "\u202e" not in shown
    assert "\\x1b]0;owned" in shown
    assert "⟦" in shown  # without colours, these marks show the trained text


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux raises this once the other side is closed
        return b""


def test_columns_align_and_the_last_one_wraps_with_its_indent():
    terminal = console(40)
    terminal.columns([("rate", "0.002", "one two three four five six seven"), ("学习率", "1", "short")])
    assert terminal.file.getvalue().splitlines() == [
        "  rate    0.002  one two three four five",
        "                 six seven",
        "  学习率  1      short",
    ]


def test_a_terminal_width_of_zero_does_not_lose_output(monkeypatch, capsys):
    # With COLUMNS=0 a command's result was lost, with exit code 0.
    monkeypatch.setenv("COLUMNS", "0")
    Console().say("a result")
    assert capsys.readouterr().out == "a result\n"


@pytest.mark.parametrize(("kind", "draws"), [("xterm", True), ("dumb", False)])
def test_progress_bars_are_disabled_on_a_dumb_terminal(monkeypatch, kind, draws):
    # A run in Emacs' shell printed nothing between its first and its last line.
    monkeypatch.setenv("TERM", kind)
    spoken = console(100, terminal=True)
    assert spoken.is_terminal and spoken.draws is draws
    assert progress_bar(spoken).disable is not draws
