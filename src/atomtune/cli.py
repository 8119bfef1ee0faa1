"""CLI: reads the settings, calls a command's module, prints.

Modules are imported late, so that --help loads no torch.
"""

import atexit
import contextlib
import difflib
import importlib
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from atomtune import __version__
from atomtune.console import Console, LastingStream, controls_shown, print_json, without_passwords
from atomtune.errors import AtomtuneError, BadSettings, ExitCode
from atomtune.language import LANGUAGES, language_of, spoken, translated
from atomtune.process import STOP_SIGNALS

#: Seconds after which a signal that could not be handled is sent again.
_AGAIN_SECONDS = 0.05


@dataclass(frozen=True)
class Command:
    """A command: its line in the overview, and the module whose function of the same name runs it."""

    summary: str
    module: str


COMMANDS = {
    "train": Command("Train a LoRA adapter on a file of records.", "atomtune.train.run"),
    "inspect": Command(
        "Show which tokens of your records are learned, and which records have problems; no model is loaded.",
        "atomtune.inspect.command",
    ),
    "plan": Command(
        "Estimate the tokens, memory and time of a run; only the model's config is read.",
        "atomtune.plan.command",
    ),
    "sweep": Command(
        "Try several settings of train, compare them on held-out records, and recommend one.", "atomtune.sweep.command"
    ),
    "verify": Command(
        "Prove that training with shared prefixes equals plain transformers + PEFT, on your model and records.",
        "atomtune.verify",
    ),
    "evaluate": Command(
        "Compare the base and the tuned model on records that were not trained on.", "atomtune.evaluate.command"
    ),
    "certify": Command("Prove that an engine serves the model that was trained.", "atomtune.certify.command"),
    "merge": Command("Merge base and adapter into one plain model folder.", "atomtune.export.merge"),
    "export": Command(
        "Write a GGUF for llama.cpp and Ollama, or the adapter for another model class.", "atomtune.export.command"
    ),
    "serve": Command("Serve a trained adapter with an OpenAI-compatible API.", "atomtune.serve.command"),
    "runs": Command("List the runs in a folder, or compare runs: settings and losses.", "atomtune.runs"),
    "chat": Command("Chat with a trained adapter in the terminal.", "atomtune.serve.chat"),
    "web": Command("Chat with a trained adapter in the browser, side by side with its base.", "atomtune.serve.web"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (errors.ExitCode)."""
    if argv is None:  # the process runs only this command
        atexit.register(_ignore_signals)
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show 灯 or … shows \u706f
    words, language = _without_language(sys.argv[1:] if argv is None else argv)
    with _lasting_streams() as output, spoken(language if language in LANGUAGES else "en"):
        if language in LANGUAGES:
            code = _answer(words)
        else:
            _say_error(f"atomtune: --language {language!r}: expected one of {', '.join(LANGUAGES)}.")
            code = ExitCode.USER_MISTAKE
        output.flush()
        error = output.error if isinstance(output, LastingStream) else None
        if code == ExitCode.DONE and error is not None and not isinstance(error, BrokenPipeError):
            _say_error(f"atomtune: standard output cannot be written: {error.strerror}. Its output is lost.")
            code = ExitCode.RUN_FAILED
    return code


def _fill_closed_streams() -> None:
    """Open /dev/null in place of a closed input, output or error (`>&-`).

    Otherwise the next file would get its number, and a library that writes to standard error by number would write into
    that file. Python has None for such a stream.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            nothing = Path(os.devnull).open("w" if number else "r", encoding="utf-8")  # noqa: SIM115  # stays open
            setattr(sys, name, nothing)


def _without_language(argv: Sequence[str]) -> tuple[list[str], str]:
    """The words without `--language zh`, which all commands accept, and the language: from there or from the locale."""
    words, language = [], language_of()
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--language":
            language = value if equals else next(rest, "")
        else:
            words.append(word)
    return words, language


@contextlib.contextmanager
def _lasting_streams() -> Iterator[LastingStream | TextIO]:
    """Within this context a failed write to standard output or error does not end the command; yields the output."""
    streams = sys.stdout, sys.stderr
    output, errors = (LastingStream(stream) if isinstance(stream, io.TextIOWrapper) else stream for stream in streams)
    sys.stdout, sys.stderr = output, errors
    try:
        yield output
    finally:
        for stream in (output, errors):
            if isinstance(stream, LastingStream):
                stream.flush()
        sys.stdout, sys.stderr = streams


def _answer(words: Sequence[str]) -> int:
    """Run what the command line asks for; returns the exit code."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        from atomtune.settings.completion import complete

        complete({name: command.summary for name, command in COMMANDS.items()})
    if not words or words[0] in ("-h", "--help", "help"):
        if words[1:] == ["json"]:
            _print_help_as_json()
        else:
            _say_overview()
        return ExitCode.DONE
    name, *flags = words
    if name in ("-V", "--version"):
        _say(f"atomtune {__version__}")
        return ExitCode.DONE
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {similar[0]}?" if similar else f"The commands are {', '.join(COMMANDS)}."
        _say_error(f"atomtune: there is no command {name!r}. {hint}")
        return ExitCode.USER_MISTAKE
    if any(word in ("-h", "--help") for word in flags):
        if "json" in flags:
            _print_help_as_json(name)
        else:
            _say(_help(name, everything="all" in flags))
        return ExitCode.DONE
    return _exit_code_of(name, flags)


def _exit_code_of(name: str, flags: Sequence[str]) -> int:
    """Run a command; an error becomes text on standard error, and an exit code."""
    # bitsandbytes warns about missing optional kernels whenever it is imported, which PEFT does.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    records_before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_VisibleRecord)
    handlers_before = _stop_on_signals()  # until a run installs its own handlers
    hook_before, sys.unraisablehook = sys.unraisablehook, _hear_again(sys.unraisablehook)
    try:
        return _run(name, flags)
    except AtomtuneError as error:
        return _reported(name, error)
    except KeyboardInterrupt:
        _say_error(f"\natomtune {name}: stopped by a signal.")
        return ExitCode.STOPPED
    except Exception as error:  # noqa: BLE001  # any other error is a bug, and shown in full
        return _unforeseen(name, error)
    finally:
        sys.unraisablehook = hook_before
        logging.setLogRecordFactory(records_before)
        for number, handler in handlers_before.items():
            signal.signal(number, handler)


class _VisibleRecord(logging.LogRecord):
    """Log records of libraries, which may quote files; control characters are shown instead of taking effect."""

    def getMessage(self) -> str:  # the name that logging calls
        return controls_shown(super().getMessage())


def _reported(name: str, error: AtomtuneError) -> int:
    _say_error(f"\natomtune {name}: {error}")
    return error.exit_code


def _run(name: str, flags: Sequence[str]) -> int:
    """Run a command. Its settings are read first, so a wrong flag is reported before the module imports torch."""
    from atomtune.settings.environment import (
        keep_to_granted_cores,
        let_waiting_threads_sleep,
        number_problems,
        repetition_notice,
        start_problems,
    )

    let_waiting_threads_sleep()
    keep_to_granted_cores()
    if problems := [*number_problems(), *start_problems()]:
        raise BadSettings(problems)
    if repeated := repetition_notice(name):
        _notice(repeated)
    from atomtune.settings.read import read

    settings = read(name, flags, notice=_notice)
    command = getattr(importlib.import_module(COMMANDS[name].module), name)
    return int(command(settings))


def _unforeseen(name: str, error: Exception) -> int:
    """Report a problem of a path, disk, memory or kernel that the command did not explain; anything else is a bug."""
    from atomtune.model.failures import explained_failure

    if failure := explained_failure(error):
        return _reported(name, failure)
    _say_error("".join(traceback.format_exception(error)).rstrip())
    _say_error(f"\natomtune {name}: this is a bug in atomtune {__version__}. Please report the lines above.")
    return ExitCode.BUG


def _help(name: str, *, everything: bool) -> str:
    from atomtune.settings.help import help_text
    from atomtune.settings.read import GROUPS

    return help_text(name, COMMANDS[name].summary, GROUPS[name], everything=everything)


def _print_help_as_json(name: str | None = None) -> None:
    """Print the help of one command, or of all, as JSON."""
    from atomtune.settings.help_json import command_values, overview_values
    from atomtune.settings.read import GROUPS

    if name is not None:
        print_json(command_values(name, COMMANDS[name].summary, GROUPS[name]))
        return
    print_json(overview_values({name: command.summary for name, command in COMMANDS.items()}, GROUPS))


def _notice(text: str) -> None:
    """Print a notice on standard error, and only in the first process of a job."""
    from atomtune.settings.environment import is_first_process

    Console(stderr=True, speaks=is_first_process()).notice(text)


def _say(text: str) -> None:
    Console().say(text)


def _say_error(text: str) -> None:
    Console(stderr=True).say(without_passwords(text))


def _stop_on_signals() -> dict[int, Any]:
    """Make stop signals raise KeyboardInterrupt with their name; returns the handlers before.

    During the import of a C extension, the exception would become an ImportError that looks like a bug, so the signal
    is sent again later.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if _imports_extension(frame):
            _send_later(number)
            return
        raise KeyboardInterrupt(signal.Signals(number).name)

    handlers_before = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            handlers_before[number] = signal.signal(number, stop)
    return handlers_before


def _ignore_signals() -> None:
    """Ignore stop signals while Python unloads the libraries: the command is done and its exit code settled."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _imports_extension(frame: FrameType | None) -> bool:
    """Whether a frame is inside the import of a C extension."""
    while frame is not None:
        loads = frame.f_code.co_name in ("create_module", "exec_module")
        if loads and isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


def _send_later(number: int) -> None:
    """Send a signal again a moment later."""
    send = partial(os.kill, os.getpid()) if os.name == "posix" else signal.raise_signal
    threading.Timer(_AGAIN_SECONDS, send, [number]).start()


def _hear_again(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    """Send a signal again if it arrived while Python was freeing an object.

    Its KeyboardInterrupt is then raised in the object's __del__, where Python only prints it. Libraries free thousands
    of objects while they are imported.
    """

    def unraisable(unraised: Any) -> None:
        if not isinstance(unraised.exc_value, KeyboardInterrupt):
            hook(unraised)
            return
        # Not raised here, because this runs inside __del__ too
        _send_later(getattr(signal, str(unraised.exc_value), signal.SIGINT))

    return unraisable


def _say_overview() -> None:
    """Print all commands with their lines."""
    console = Console()
    console.say(translated(f"atomtune {__version__}: LoRA instruction fine-tuning"))
    console.say(translated("\nusage: atomtune COMMAND [--help] …\n"))
    console.columns([[name, command.summary] for name, command in COMMANDS.items()])
    console.say("\n`atomtune train` alone trains the built-in demo on a CPU, in about a minute.")
    console.say("`atomtune --help json` prints the same, and every setting, as JSON.")
    console.say(
        "`--language zh` with any command, or a Chinese locale, switches messages, screens and help to Chinese."
    )
