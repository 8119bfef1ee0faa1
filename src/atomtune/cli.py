"""The commands: parse, call, print. Each imports its rooms inside, so that --help loads no torch."""

import difflib
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from atomtune import __version__
from atomtune.errors import AtomtuneError

#: What a failed process answers, by cause; see also errors.py.
DONE, BUG, USER, FAILED, STOPPED = 0, 1, 2, 3, 75


def train(argv: Sequence[str]) -> int:
    """Train a LoRA adapter on a file of records."""
    from atomtune.settings.read import read_train

    settings = read_train(argv)
    from atomtune.train.run import train as run

    return run(settings)


def inspect(argv: Sequence[str]) -> int:
    """Show what of your records is learned, and what is wrong with them; no model is loaded."""
    from atomtune.settings.fields import InspectSettings
    from atomtune.settings.read import read_settings

    settings = read_settings(InspectSettings, argv, command="inspect")
    from atomtune.inspect.command import inspect as run

    return run(settings)


def verify(argv: Sequence[str]) -> int:
    """Prove the fast path equal to plain transformers + PEFT on your model and records."""
    from atomtune.settings.fields import VerifySettings
    from atomtune.settings.read import read_settings

    settings = read_settings(VerifySettings, argv, command="verify")
    from atomtune.verify import verify as run

    return run(settings)


def merge(argv: Sequence[str]) -> int:
    """Write base + adapter as one plain model folder."""
    from atomtune.settings.fields import MergeSettings
    from atomtune.settings.read import read_settings

    settings = read_settings(MergeSettings, argv, command="merge")
    from atomtune.export.merge import merge as run

    return run(settings)


def chat(argv: Sequence[str]) -> int:
    """Talk to a trained adapter in the terminal."""
    from atomtune.settings.fields import ChatSettings
    from atomtune.settings.read import read_settings

    settings = read_settings(ChatSettings, argv, command="chat")
    from atomtune.serve.chat import chat as run

    return run(settings)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "inspect": inspect,
    "verify": verify,
    "merge": merge,
    "chat": chat,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see the README for their meaning)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
    elif words[0] in ("-V", "--version"):
        print(f"atomtune {__version__}")
    elif words[0] in COMMANDS:
        return _answered(words[0], words[1:])
    else:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Commands: {', '.join(COMMANDS)}."
        print(f"atomtune: no command {words[0]!r}. {hint}", file=sys.stderr)
        return USER
    return DONE


def _answered(name: str, argv: Sequence[str]) -> int:
    """The exit code of a command; errors as text on standard error."""
    code = BUG
    # bitsandbytes speaks of missing optional kernels at import, which happens wherever PEFT is imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    before = _leave_on_signals()  # until a run installs its own
    try:
        return COMMANDS[name](argv)
    except AtomtuneError as error:
        print(f"\natomtune {name}: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print(f"\natomtune {name}: stopped by a signal.", file=sys.stderr)
        code = STOPPED
    except Exception as error:  # noqa: BLE001  # the last line of defence: shown whole, never swallowed
        code = _unforeseen(name, error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


def _unforeseen(name: str, error: Exception) -> int:
    """A disk that failed, in a command without words of its own for it; else a bug, shown whole."""
    from atomtune.disk import disk_failed

    if disk_failed(error):
        print(f"\natomtune {name}: the disk is full, or it fails: {error}", file=sys.stderr)
        print("Free some space and run the command again.", file=sys.stderr)
        return FAILED
    traceback.print_exc()
    said = f"this is a bug in atomtune {__version__}; please report the lines above."
    print(f"\natomtune {name}: {said}", file=sys.stderr)
    return BUG


def _leave_on_signals() -> dict[int, Any]:
    """Have the signals that end a process raise KeyboardInterrupt with their name; what was there before."""

    def leave(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    numbers = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP", "SIGUSR1"))
    heard = [number for number in numbers if number is not None and signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, leave) for number in heard}


def _overview() -> str:
    lines = [f"  {name:<8} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"atomtune {__version__}: LoRA instruction fine-tuning",
            "",
            "usage: atomtune COMMAND [--help] …",
            "",
            *lines,
            "",
            "`atomtune train` with nothing else runs the embedded demo, on a CPU, in about a minute.",
        ]
    )
