"""With a standard output that is full, closed or of another encoding, results still arrive and exit codes are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import DIALOGUES, write_jsonl

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")


@pytest.fixture(scope="module")
def words(models, tmp_path_factory) -> list[str]:
    data = write_jsonl(tmp_path_factory.mktemp("streams") / "灯é😀.jsonl", DIALOGUES)
    return ["inspect", str(data), "--model_path", str(models("llama"))]


def run(words: list[str], redirection: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command in its own shell, with this redirection."""
    command = f'exec "$0" -m atomtune "$@" {redirection}'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, *words],
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_an_unwritable_stdout_is_reported_and_exits_with_an_error(words):
    done = run(words, "> /dev/full")
    assert done.returncode == 3
    assert b"standard output cannot be written: No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


@pytest.mark.slow
def test_an_unwritable_stdout_does_not_stop_a_merge(by_heart, tmp_path):
    merge = ["merge", "--adapter_path", str(by_heart), "--output_dir", str(tmp_path / "m")]
    assert run(merge, "> /dev/full 2> /dev/full").returncode == 3
    assert (tmp_path / "m" / "config.json").is_file()


@pytest.mark.parametrize("words_of_help", [["--help"], ["train", "--help", "all"], ["--version"]])
def test_help_to_an_unwritable_stdout_fails_without_a_traceback(words_of_help):
    done = run(words_of_help, "> /dev/full")
    assert done.returncode == 3 and b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


@pytest.mark.slow
def test_a_closed_output_pipe_is_not_an_error(words):
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -m atomtune "$@" | head -c 1', sys.executable, *words],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"Exception ignored" not in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&-", "</dev/null >&- 2>&-"])
def test_closed_output_streams_are_not_an_error(words, streams):
    # Without the three streams, the first opened files got their numbers, and a library used a wrong one.
    done = run(words, streams)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


@pytest.fixture(scope="module")
def chat(by_heart) -> list[str]:
    return ["chat", "--adapter_path", str(by_heart), "--dtype", "float32", "--max_new_tokens", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["--prompt x >&-", "--prompt x <&- >&- 2>&-", "<&-"])
def test_chat_works_with_closed_standard_streams(chat, streams):
    # Python has None for a closed stream, and chat asks whether it is a terminal.
    done = run(chat, streams)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.slow
def test_an_unreadable_stdin_is_reported(chat):
    done = run(chat, "0> /dev/null")
    assert done.returncode == 2, done.stderr
    assert b"standard input cannot be read: Bad file descriptor." in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code"), [("你好".encode(), 0), (b"\xff\xfe", 2)], ids=["a question in UTF-8", "no text"]
)
def test_piped_input_is_read_as_utf_8_even_in_an_ascii_locale(chat, tmp_path, line, code):
    (tmp_path / "asked").write_bytes(line + b"\n")
    done = run(chat, f"< {tmp_path}/asked", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == code, done.stderr
    assert code == 0 or b"standard input is not UTF-8" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["ascii", "latin-1", "C"],
)
def test_json_output_stays_valid_under_a_limited_output_encoding(words, usual, environment):
    result = run([*words, "--json"], **environment)
    assert result.returncode == 0, result.stderr
    assert b"Traceback" not in result.stderr  # the report itself, although the encoding lacks characters
    assert json.loads(result.stdout.decode("latin-1")) == usual


@pytest.fixture(scope="module")
def usual(words) -> object:
    return json.loads(run([*words, "--json"], PYTHONIOENCODING="utf-8").stdout)


@pytest.mark.slow
def test_a_report_is_escaped_for_an_ascii_stdout(words):
    done = run(words, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.isascii() and b"\\u" in done.stdout
