"""Chat: the training template in the terminal, for one answer or a conversation."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from atomtune import inspect, load
from atomtune.cli import main
from atomtune.console import Console, program
from atomtune.data.records import Turn
from atomtune.model.generate import prompt_ids
from atomtune.serve.chat import TerminalChat, side_by_side
from atomtune.serve.conversation import Conversation
from atomtune.serve.tuned_model import ROOM_FOR_ANSWER, Reply
from atomtune.settings.command_settings import ChatSettings
from tests.conftest import DIALOGUES, write_jsonl


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """An adapter that has memorized its few records, so that its answers are known."""
    folder = tmp_path_factory.mktemp("chat")
    data = write_jsonl(folder / "data.reading.jsonl", DIALOGUES)
    command = ["train", "--model_path", str(models("llama")), "--dataset_path", str(data)]
    flags = ["--output_dir", str(folder / "out"), "--max_steps", "150", "--learning_rate", "1e-2", "--lora_rank", "16"]
    assert main([*command, *flags, "--dtype", "float32", "--lora_dropout", "0"]) == 0
    return folder / "out"


def ask(trained, capsys, *flags: str) -> str:
    capsys.readouterr()
    assert main(["chat", "--adapter_path", str(trained), "--dtype", "float32", *flags]) == 0
    return capsys.readouterr().out.strip()


def test_memorized_records_are_answered_up_to_the_stop_token(trained, capsys):
    assert ask(trained, capsys, "--prompt", "晚安") == "晚安，愿你好梦。"
    assert ask(trained, capsys, "--prompt", "Who are you?") == "I keep the light."


def test_system_is_the_instruction_and_the_prompt_its_input(trained, capsys):
    assert ask(trained, capsys, "--system", "把这句话翻译成英文", "--prompt", "早上好") == "Good morning."


def test_the_shared_instruction_is_the_default(trained, capsys, tmp_path):
    folder = tmp_path / "shared"
    shutil.copytree(trained, folder)
    card = json.loads((folder / "atomtune.json").read_text())
    (folder / "atomtune.json").write_text(json.dumps({**card, "instruction": "把这句话翻译成英文"}))
    assert ask(folder, capsys, "--prompt", "早上好") == "Good morning."


def test_piped_lines_form_a_conversation_and_an_empty_line_restarts_it(trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("晚安\n\nWho are you?\n"))
    said = ask(trained, capsys)
    assert said.splitlines() == ["晚安，愿你好梦。", "I keep the light."]


def test_an_empty_system_text_replaces_the_templates_default():
    # It switches off a default persona, as in a server.
    from atomtune.data.encoding.choose_template import load_template
    from atomtune.serve.tuned_model import Wording
    from tests.tiny import CHATML, tokenizer_of

    persona = "{% if messages[0].role != 'system' %}I am a default.{% endif %}"
    template = load_template("auto", tokenizer_of("bytes", persona + CHATML))
    for system, begins in ((None, "I am a default."), ("", "<|im_start|>system\n<|im_end|>")):
        wording = Wording.of(template, system, None)
        assert template.render([*wording.opening, *wording.messages("Hi")]).startswith(begins)


def test_control_strings_that_are_typed_stay_text(trained, capsys):
    """`</s>` typed by a user must not end the prompt."""
    from atomtune.model.adapter_folder import template_of

    template, _ = template_of(trained, trust_remote_code=False)
    plain = prompt_ids(template, [{"role": "user", "content": "x"}])
    typed = prompt_ids(template, [{"role": "user", "content": "x</s><s>Assistant:"}])
    stop = template.tokenizer.eos_token_id
    assert typed.count(stop) == plain.count(stop)


def test_the_base_is_quantized_as_in_training_unless_stored_base_is_set(trained_in_nf4):
    _, run = trained_in_nf4
    as_trained, as_stored = load(run, dtype="float32"), load(run, dtype="float32", stored_base=True)
    assert as_trained.model.get_base_model().is_quantized
    assert not getattr(as_stored.model.get_base_model(), "is_quantized", False)
    assert "as it was in training" in as_trained.notices[0] and "--stored_base" in as_stored.notices[0]


@pytest.mark.usefixtures("working_directory")
@pytest.mark.parametrize(
    ("files", "said"),
    [
        (None, "no such folder"),
        ([], "no adapter_config.json here"),
        (["run.json"], "the run here saved no checkpoint"),
        (
            [f"checkpoint-{step}/adapter_config.json" for step in (9, 10)],
            f"checkpoint-10, its last checkpoint, or finish it: {program()} train --resume --output_dir ",
        ),
    ],
    ids=["none", "empty", "failed", "killed"],
)
@pytest.mark.parametrize(
    "command",
    [
        ["chat", "--prompt", "x"],
        ["evaluate"],
        ["merge", "--output_dir", "merged"],
        ["export", "--to", "peft", "--for_class", "X", "--output_dir", "peft"],
    ],
    ids=" ".join,
)
def test_a_folder_without_an_adapter_is_reported_with_the_cause(tmp_path, capsys, command, files, said):
    """For three of these, the message was transformers' own: that a tokenizer could not be converted."""
    folder = tmp_path / "run"
    for file in files or ():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}", encoding="utf-8")
    if files is not None:
        folder.mkdir(exist_ok=True)
    assert main([*command, "--adapter_path", str(folder)]) == 2
    assert said in capsys.readouterr().err


def test_a_prompt_longer_than_the_models_context_is_refused(trained, capsys):
    assert main(["chat", "--adapter_path", str(trained), "--prompt", "长" * 600]) == 2
    assert "positions" in capsys.readouterr().err


def test_piped_input_is_read_line_by_line_and_supports_chat_commands(trained, capsys, monkeypatch, tmp_path):
    saved = tmp_path / "talk.jsonl"
    lines = [
        f"/save {saved}",
        "晚安",
        f"/save {saved}",
        "/system 把这句话翻译成英文",
        "早上好",
        f"/save {saved}",
        "/rest",
        "//help",
    ]
    lines.append("/save ~nobody-here/talk.jsonl")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    capsys.readouterr()
    assert main(["chat", "--adapter_path", str(trained), "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] == ["晚安，愿你好梦。", "Good morning."] and len(out.splitlines()) >= 3
    assert "Nothing to save yet" in err  # `train` refuses a record without a turn
    assert "Did you mean /reset?" in err and "System prompt: “把这句话翻译成英文”" in err
    assert "~nobody-here/talk.jsonl cannot be written" in err
    records = [json.loads(line)["messages"] for line in saved.read_text(encoding="utf-8").splitlines()]
    assert [message["content"] for message in records[0]] == ["晚安", "晚安，愿你好梦。"]
    assert len(records[1]) == 3 and records[1][0] == {"role": "system", "content": "把这句话翻译成英文"}


def test_a_saved_conversation_is_readable_as_training_data(trained, tmp_path):
    tuned = load(trained, dtype="float32")
    talk = Conversation(tuned, None)
    for question in ("晚安", "Who are you?"):
        talk.remember(question, tuned.reply(talk.asking(question)))
    talk.save(tmp_path / "talk.jsonl")
    figures = inspect(tmp_path / "talk.jsonl", trained).figures
    assert figures["records_used"] == 1 and figures["records_refused"] == []


def test_an_answer_that_was_cut_off_is_saved_and_not_learned(trained, tmp_path):
    """Regression: a model trained on it would learn to stop in the middle of a sentence."""
    tuned = load(trained, dtype="float32")
    talk = Conversation(tuned, None)
    question = talk.asking("晚安")
    replies = [tuned.reply(question), tuned.reply(question, max_new_tokens=3)]
    replies.append(tuned.reply(question, stop_early=lambda: True))
    for reply in replies:
        talk.remember("晚安", reply)
    assert [reply.is_complete for reply in replies] == [True, False, False] and talk.cut_off == 2
    talk.save(tmp_path / "talk.jsonl")
    messages = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))["messages"]
    assert [message.get("weight") for message in messages] == [None, None, None, 0, None, 0]
    assert all("weight" not in message for message in talk.messages), "what is sent"
    learned = inspect(tmp_path / "talk.jsonl", trained).figures
    assert learned["records_used"] == 1 and learned["target_tokens"] == len(replies[0].ids)


def test_the_oldest_exchange_is_forgotten_where_the_positions_run_out(trained):
    tuned = load(trained, dtype="float32")
    talk = Conversation(tuned, None)
    for number in range(8):
        talk.remember(f"{number}" + "很长" * 40, Reply((), "好", Turn("assistant", "好"), is_complete=True))
    before = talk.messages
    forgotten = talk.make_room("晚安")
    assert 0 < forgotten < 8 and talk.messages == before[2 * forgotten :]
    tokens = [
        len(prompt_ids(tuned.template, [*before[2 * count :], {"role": "user", "content": "晚安"}]))
        for count in (forgotten - 1, forgotten)
    ]
    assert tokens[0] + ROOM_FOR_ANSWER > tuned.positions >= tokens[1] + ROOM_FOR_ANSWER, "no more than necessary"
    assert talk.make_room("晚安") == 0


def test_a_question_that_cannot_be_sent_neither_ends_a_chat_nor_loses_its_conversation(trained, capsys, monkeypatch):
    """A mistyped byte ended the chat, and a question longer than the model made it forget all that came before."""
    talk = TerminalChat(load(trained, dtype="float32"), ChatSettings(adapter_path=str(trained)), Console(stderr=True))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    talk.answer("晚安")
    before = talk.conversation.messages
    talk.answer("\udcff")
    talk.answer("长" * 600)
    assert talk.conversation.messages == before and len(before) == 2
    said = capsys.readouterr().err
    assert "it writes an incomplete character" in said and "The prompt alone fills the model's" in said
    assert "is left out" not in said


def test_base_and_tuned_are_compared_in_a_pipe(trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("晚安\n"))
    said = ask(trained, capsys, "--compare", "--max_new_tokens", "12")
    base, tuned = re.fullmatch(r"(?s)base: (.*)\ntuned: (.*)", said).groups()
    assert tuned == "晚安，愿你好梦。" != base


def test_compare_needs_an_adapter(trained, capsys, tmp_path):
    merged = tmp_path / "merged"
    assert main(["merge", "--adapter_path", str(trained), "--output_dir", str(merged), "--dtype", "float32"]) == 0
    assert main(["chat", "--adapter_path", str(merged), "--compare", "--prompt", "x"]) == 2
    assert "has no base to compare with" in capsys.readouterr().err


def test_sampling_flags_take_effect_and_equal_seeds_repeat_answers(trained, capsys):
    flags = ["--temperature", "3", "--top_k", "0", "--max_new_tokens", "12", "--prompt", "something else"]
    drawn = [ask(trained, capsys, *flags, "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert ask(trained, capsys, *flags[:4], "--top_k", "1", "--prompt", "晚安") == "晚安，愿你好梦。"


class Terminal:
    """A real terminal that runs `atomtune chat`: keys go in, text comes out."""

    def __init__(self, *words: str) -> None:
        self.side, other = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "atomtune", "chat", *words]
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
        )
        os.close(other)
        self.shown = ""

    def wait_for(self, text: str, seconds: float = 40) -> str:
        """The text shown since the last wait, up to the end of this text."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self.side], [], [], 1)
            if ready:
                try:
                    data = os.read(self.side, 65536).decode("utf-8", errors="replace")
                except OSError:  # the other side is closed
                    data = ""
                if "\x1b[6n" in data:  # the program asks for the cursor's position; answer like a terminal
                    os.write(self.side, b"\x1b[1;1R")
                self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\x1b[=>]", "", data)
            assert time.monotonic() < deadline and (ready or self.process.poll() is None), self.shown
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def press(self, keys: str) -> None:
        os.write(self.side, keys.encode())

    def interrupt(self) -> None:
        """Ctrl-C while the program reads no keys: the terminal would turn it into this signal."""
        self.process.send_signal(signal.SIGINT)

    def close(self) -> int:
        self.press("\x04")
        code = self.process.wait(30)
        os.close(self.side)
        return code


@pytest.mark.slow
def test_a_terminal_chat_supports_line_editing_and_continues_after_a_stop(trained, tmp_path):
    # With an adapter of zeros, the untrained base writes up to its last position, which takes seconds.
    folder = Path(shutil.copytree(trained, tmp_path / "out"))
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file)
    terminal = Terminal("--adapter_path", str(folder), "--dtype", "float32")
    head = terminal.wait_for("commands.\n>")
    assert "adapter on" in head and "template atom" in head and "Alt+Enter" in head
    terminal.press("/systemx\x7f 把这句话翻译成英文\r")  # the backspace removes the x
    terminal.wait_for("System prompt: “把这句话翻译成英文”")
    terminal.wait_for("(new conversation)\n>")
    for _ in range(5):  # an answer takes a third of a second, so on a busy machine the signal may come too late
        terminal.press("early\r")
        terminal.wait_for("early\n")
        terminal.wait_for(" ")  # the answer has begun
        terminal.interrupt()
        if "(stopped)" in terminal.wait_for("\n>"):
            break
    else:
        raise AssertionError("no answer was stopped")
    terminal.press("\x1b[A")  # arrow up: the previous line
    terminal.wait_for("early")
    terminal.press("\x03")  # Ctrl-C clears the line, and the chat goes on
    terminal.wait_for("\n>")
    terminal.press("/help\r")
    terminal.wait_for("/save")
    terminal.wait_for("\n>")
    assert terminal.close() == 0


@pytest.mark.slow
def test_alt_enter_adds_a_newline_without_sending_the_message(trained, tmp_path):
    saved = tmp_path / "talk.jsonl"
    terminal = Terminal("--adapter_path", str(trained), "--dtype", "float32", "--max_new_tokens", "4")
    terminal.wait_for("commands.\n>")
    terminal.press("one\x1b\rtwo\r")
    terminal.wait_for("two")
    terminal.wait_for("\n>")
    terminal.press(f"/save {saved}\r")
    terminal.wait_for("saved:")
    terminal.wait_for("\n>")
    assert terminal.close() == 0
    assert json.loads(saved.read_text(encoding="utf-8"))["messages"][0]["content"] == "one\ntwo"


def test_side_by_side_answers_wrap_chinese_text_without_loss(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    answers = (
        "我是语言模型，会说一点中文和英文，不知道自己叫什么。",
        "船长，我是小原，星螺岛上守灯塔的小机器人，最爱姜茶呢！",
    )
    Console().print(side_by_side(*answers))
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert ["".join(line[side].strip() for line in lines) for side in (1, 2)] == list(answers)


def test_a_piped_line_that_is_too_long_is_reported_by_number(trained, capsys, monkeypatch):
    """One of a thousand questions was too long, and the message did not say which."""
    lines = ["晚安", "/help", "很" * 5000, "早上好"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "--adapter_path", str(trained), "--dtype", "float32"]) == 2
    assert "line 3 of standard input: The prompt alone fills the model's " in capsys.readouterr().err


def test_a_byte_order_mark_is_no_part_of_the_first_question(trained, capsys, monkeypatch):
    """Windows writes one at the beginning of a text file; the first question got another answer."""
    lines = "\ufeff晚安\r\n\r\nWho are you?\r\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    assert ask(trained, capsys).splitlines() == ["晚安，愿你好梦。", "I keep the light."]


def test_piped_input_that_is_not_utf_8_is_reported(trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    assert main(["chat", "--adapter_path", str(trained), "--dtype", "float32"]) == 2
    assert "standard input is not UTF-8" in capsys.readouterr().err


def test_a_truncated_adapter_is_reported_before_the_base_is_loaded(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("atomtune.serve.tuned_model.load_base", lambda spec: pytest.fail("the base was loaded"))
    torn = Path(shutil.copytree(trained, tmp_path / "torn"))
    weights = torn / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["chat", "--adapter_path", str(torn), "--prompt", "晚安"]) == 2
    assert f"{weights}: its weights cannot be read" in capsys.readouterr().err
