"""Errors: one small tree; only the CLI turns one into text and an exit code.

A message says where, what was found, what was expected, what to do. All problems of one kind come in one error,
so that a user mends a file or a command once.
"""

from collections.abc import Sequence

SHOWN = 20


def listing(lines: Sequence[str], shown: int = SHOWN) -> str:
    """Join problem lines, the first `shown` of them, and say how many more there are."""
    rest = len(lines) - shown
    return "\n".join([*lines[:shown], *([f"… and {rest:,} more."] if rest > 0 else [])])


class AtomtuneError(Exception):
    """Base of all errors that are answered without a traceback."""

    exit_code = 1


class UserError(AtomtuneError):
    """The user can mend it: a wrong flag, a broken file, a missing model."""

    exit_code = 2


class BadSettings(UserError):
    """Settings that are unknown, of a wrong kind or out of range: all of them at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(listing(problems))


class BadData(UserError):
    """A data file, or records in it, that cannot be used."""


class BadModel(UserError):
    """A model, tokenizer or adapter that cannot be loaded or does not fit."""


class RunFailed(AtomtuneError):
    """The run failed for a stated reason: non-finite loss, disk full, out of memory, empty adapter."""

    exit_code = 3


class CheckFailed(AtomtuneError):
    """A check that was asked for did not hold."""

    exit_code = 4


class Stopped(AtomtuneError):
    """A signal stopped the run; it can be resumed."""

    exit_code = 75
