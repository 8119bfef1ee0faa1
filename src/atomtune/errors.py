"""Errors: a small class tree and the exit codes; only the CLI turns an error into text and an exit code.

A message says where the problem is, what was found, what was expected, and what to do. One error reports all problems
of a kind, so that a user corrects a file or a command only once.
"""

from collections.abc import Sequence
from enum import IntEnum

SHOWN = 20


class ExitCode(IntEnum):
    """Exit codes. Scripts and job schedulers rely on these numbers."""

    DONE = 0
    BUG = 1
    USER_MISTAKE = 2
    RUN_FAILED = 3
    CHECK_FAILED = 4
    STOPPED = 75  # EX_TEMPFAIL in sysexits.h: schedulers start such a job again


#: For `--help` and the guide.
EXIT_CODE_MEANINGS = {
    ExitCode.DONE: "the command succeeded",
    ExitCode.BUG: "a bug in atomtune",
    ExitCode.USER_MISTAKE: "a setting, a file or a model cannot be used; the message says what to change",
    ExitCode.RUN_FAILED: "the run failed: the loss is not finite, the disk is full, memory ran out, …",
    ExitCode.CHECK_FAILED: "a check failed: verify, certify, export, serve, inspect --fail_on, or merge",
    ExitCode.STOPPED: "stopped by a signal or by --max_minutes; --resume continues",
}


def listing(lines: Sequence[str], shown: int = SHOWN, *, unlisted: int = 0) -> str:
    """Join the first `shown` lines, and say how many more problems there are.

    unlisted  further problems that have no line here
    """
    rest = max(len(lines) - shown, 0) + unlisted
    return "\n".join([*lines[:shown], *([f"… and {rest:,} more."] if rest else [])])


class AtomtuneError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code = ExitCode.BUG


class UserError(AtomtuneError):
    """An error that the user can correct: a wrong flag, a broken file, a missing model."""

    exit_code = ExitCode.USER_MISTAKE


class BadSettings(UserError):
    """Settings that are unknown, of a wrong type or out of range; all problems at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(listing(problems))


class BadData(UserError):
    """A data file, or records in it, that cannot be used."""


class BadModel(UserError):
    """A model, tokenizer or adapter that cannot be loaded or does not fit."""


class RunFailed(AtomtuneError):
    """The run failed for a stated reason: non-finite loss, disk full, out of memory, empty adapter."""

    exit_code = ExitCode.RUN_FAILED


class CheckFailed(AtomtuneError):
    """A check that the user asked for failed."""

    exit_code = ExitCode.CHECK_FAILED


class Stopped(AtomtuneError):
    """A signal stopped the run; it can be resumed."""

    exit_code = ExitCode.STOPPED
