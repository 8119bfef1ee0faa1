"""Laws of the command line, checked in real processes: what is printed where, and the exit codes."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import pytest

from atomtune import __version__, cli
from atomtune.cli import COMMANDS, main
from atomtune.errors import AtomtuneError, ExitCode

HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "numpy", "matplotlib"}
#: Run the command in its own process, then print the modules that it loaded.
REPORTING = """
import json, sys
from atomtune.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
print("\\n" + json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def atomtune(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "atomtune", *words], capture_output=True, encoding="utf-8", check=False, timeout=60
    )


def answered(*words: str) -> tuple[int, str, str, set[str]]:
    """Exit code, standard output, standard error, and the modules that were loaded."""
    done = subprocess.run(
        [sys.executable, "-c", REPORTING, *words], capture_output=True, encoding="utf-8", check=True, timeout=60
    )
    out, _, last = done.stdout.rstrip("\n").rpartition("\n")
    code, modules = json.loads(last)
    return code, out, done.stderr, set(modules)


def test_the_overview_names_every_command():
    code, out, err, modules = answered("--help")
    assert (code, err) == (0, "")
    assert all(name in out for name in COMMANDS)
    assert not modules & HEAVY


def test_no_command_prints_the_overview():
    assert answered()[:2] == answered("--help")[:2]


@pytest.mark.parametrize(
    "command",
    [name if name in ("train", "chat") else pytest.param(name, marks=pytest.mark.slow) for name in sorted(COMMANDS)],
)
def test_help_of_a_command_names_its_settings_and_loads_no_torch(command):
    # Importing torch and transformers takes seconds, which --help must not.
    code, out, err, modules = answered(command, "--help")
    assert (code, err) == (0, "")
    assert f"usage: atomtune {command}" in out
    assert ("--folder" if command == "runs" else "--model_path") in out  # `runs` needs no model
    assert not modules & HEAVY


def test_help_of_train_shows_ranges_choices_defaults_and_the_trainers_names():
    _, out, _, _ = answered("train", "--help")
    for shown in (
        "--lora_rank",
        "[8]",
        "shorten|skip|error",
        "true|false",
        "[all-linear]",
        "gradient_accumulation_steps",
    ):
        assert shown in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "--learning_rat", "1"), "Did you mean --learning_rate?"),
        (("train", "--model_path", "base"), "--dataset_path"),
        (("train", "nowhere.yaml"), "no such file"),
        (("train", "--lora_rank", "x", "--model_path", "a", "--dataset_path", "b"), "--lora_rank 'x'"),
        (("merge",), "--adapter_path"),
        (("chat", "--adapter_pat", "x"), "Did you mean --adapter_path?"),
        (("train", "-x"), "-x"),
    ],
)
def test_a_flag_error_is_reported_before_torch_is_loaded(words, said):
    code, out, err, modules = answered(*words)
    assert code == 2
    assert said in err and "Traceback" not in err
    assert out.strip() == ""
    assert not modules & HEAVY


@pytest.mark.parametrize(("wrong", "near"), [("trian", "train"), ("Chat", "chat"), ("merg", "merge")])
def test_an_unknown_command_gets_the_closest_one_suggested(wrong, near):
    done = atomtune(wrong)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Did you mean {near}?" in done.stderr


def test_an_unknown_command_without_a_close_match_lists_all_commands():
    done = atomtune("xyzzy")
    assert done.returncode == 2
    assert all(name in done.stderr for name in COMMANDS)


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_is_that_of_the_package(flag):
    done = atomtune(flag)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"atomtune {__version__}\n", "")


def test_the_installed_command_equals_running_the_module():
    command = Path(sys.executable).with_name("atomtune")
    done = subprocess.run([command, "--help"], capture_output=True, encoding="utf-8", check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, atomtune("--help").stdout)


def test_a_mistake_goes_to_standard_error_alone():
    done = atomtune("train", "--no_cuda")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--use_cpu" in done.stderr


def every_error(kind: type = AtomtuneError) -> list[type]:
    return [kind, *(error for below in kind.__subclasses__() for error in every_error(below))]


def test_the_exit_codes_are_those_that_scripts_rely_on():
    # Repeated here on purpose: other numbers would break every job script.
    promised = {"DONE": 0, "BUG": 1, "USER_MISTAKE": 2, "RUN_FAILED": 3, "CHECK_FAILED": 4, "STOPPED": 75}
    assert {code.name: code.value for code in ExitCode} == promised


@pytest.mark.parametrize("error", every_error(), ids=lambda error: error.__name__)
def test_an_error_ends_the_process_with_its_own_exit_code(error, monkeypatch, capsys):
    def fail(*_: object) -> int:
        raise error(["what happened"])

    monkeypatch.setattr("atomtune.cli._run", fail)
    assert main(["train"]) == error.exit_code
    assert "what happened" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (KeyboardInterrupt("SIGTERM"), ExitCode.STOPPED),
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.RUN_FAILED),
        (ZeroDivisionError("division by zero"), ExitCode.BUG),
    ],
)
def test_foreign_exceptions_get_an_exit_code_too(raised, code, monkeypatch, capsys):
    def fail(*_: object) -> int:
        raise raised

    monkeypatch.setattr("atomtune.cli._run", fail)
    assert main(["merge"]) == code
    assert ("Traceback" in capsys.readouterr().err) is (code == ExitCode.BUG)


def test_help_piped_to_a_program_that_exits_early_prints_no_error():
    done = subprocess.run(
        f"{sys.executable} -m atomtune train --help | head -1",
        shell=True,
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("usage: atomtune train [run.yaml] [--setting value …]\n", "")


@pytest.mark.parametrize("words", [("train", "--help"), ("train", "灯.yaml")])
def test_characters_the_terminal_cannot_encode_are_escaped(words):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "atomtune", *words], capture_output=True, check=False, timeout=60, env=environment
    )
    assert done.returncode == (0 if "--help" in words else 2)
    said = (done.stdout + done.stderr).decode("ascii")
    assert "Traceback" not in said and ("\\u2026" if "--help" in words else "\\u706f.yaml: no such file") in said


@pytest.mark.parametrize("address", ["https://user:hidden@hub.test/x.jsonl", "http://hidden@hub.test/x"])
def test_no_password_of_an_address_is_shown(models, capsys, address):
    # As a path, the address has one slash left after the colon.
    assert main(["inspect", address, "--model_path", str(models("llama"))]) == 2
    printed = capsys.readouterr()
    assert "hidden" not in printed.err + printed.out
    assert "hub.test" in printed.err


def assert_stopped(signalled: Callable[[], object], monkeypatch, capsys) -> None:
    """A command that calls `signalled`, which sends a signal, ends soon after it with the message of a stop."""

    def command(name: str, flags: object) -> int:
        signalled()
        for _ in range(1000):
            time.sleep(0.01)
        return 0

    monkeypatch.setattr(cli, "_run", command)
    assert main(["plan"]) == 75
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and "stopped by a signal" in printed.err


@pytest.mark.skipif(os.name != "posix", reason="Windows sends no signals to others")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("module", ["atomtune.cli", "rich"])
def test_a_signal_while_the_command_starts_is_a_stop(name, module):
    # Ctrl-C in the first quarter of a second showed Python's own traceback.
    code = f"""
import os, runpy, signal, sys
class Signals:
    def find_spec(self, name, path, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.{name})
sys.meta_path.insert(0, Signals())
sys.argv[1:] = ["--help"]
runpy.run_module("atomtune", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False, timeout=60)
    assert (done.returncode, done.stderr) == (75, "\natomtune: stopped by a signal.\n")


def test_the_installed_command_starts_like_the_module():
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "scripts"
    ]
    assert scripts == {"atomtune": "atomtune.__main__:main"}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_during_object_deallocation_is_handled(monkeypatch, capsys, name):
    # Python prints an exception from __del__ and drops it: Ctrl-C during an import showed a traceback, and the command
    # ran on to its end.
    class Freed:
        def __del__(self) -> None:
            signal.raise_signal(getattr(signal, name))

    def free() -> None:
        freed = Freed()
        del freed

    assert_stopped(free, monkeypatch, capsys)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_during_a_c_extension_import_is_deferred(tmp_path, monkeypatch, capsys, name):
    # Such a library turns KeyboardInterrupt into ImportError: "this is a bug" was printed, and then Python aborted.
    class Library(ExtensionFileLoader):
        def create_module(self, spec: object) -> object:
            try:
                signal.raise_signal(getattr(signal, name))
            except KeyboardInterrupt:
                raise ImportError("initialization failed") from None
            return object()

    assert_stopped(lambda: Library("library", str(tmp_path)).create_module(None), monkeypatch, capsys)


@pytest.mark.skipif(os.name != "posix", reason="Windows sends no signals to others")
def test_a_signal_after_the_result_does_not_change_the_exit_code():
    # SIGTERM while Python frees torch gave a finished run an exit code for which a scheduler starts it again.
    code = """
import os, signal, sys
sys.argv[1:] = ["--version"]
from atomtune.cli import main
class Cleared:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
cleared = Cleared()
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_control_characters_in_library_logs_are_escaped(monkeypatch, caplog):
    # transformers quotes values of config.json in its warnings.
    monkeypatch.setattr(
        cli, "_run", lambda *words: logging.getLogger("library").warning("type %s", "\x1b[31m\u202e") or 0
    )
    assert main(["plan"]) == 0
    assert caplog.messages == ["type \\x1b[31m\\u202e"]
