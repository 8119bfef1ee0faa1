"""The voice: what a command says in the terminal, and the bars it draws there."""

import contextlib
import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Patient(Console):
    """A terminal that may go away: a run goes on when the reader of its output left, as `| head` does."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Voice:
    """What the user reads; silent on every rank but the first."""

    def __init__(self, *, speaks: bool) -> None:
        self.console = Patient(quiet=not speaks, highlight=False)
        self.notices: list[str] = []

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def notice(self, text: str) -> None:
        self.notices.append(text)
        self.console.print(f"note: {text}", style="yellow", markup=False, soft_wrap=True)

    def reading(self, total_bytes: int, what: str) -> "Reading":
        return Reading(self.console, total_bytes, what)


class Reading:
    """A bar over the bytes of a file."""

    def __init__(self, console: Console, total_bytes: int, what: str) -> None:
        self.progress = bar(console, "{task.fields[rate]}", count=False)
        self.task = self.progress.add_task(what, total=total_bytes, rate="")
        self.began, self.done = time.perf_counter(), 0

    def __enter__(self) -> "Reading":
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def advance(self, n_bytes: int) -> None:
        self.done += n_bytes
        rate = self.done / 2**20 / max(time.perf_counter() - self.began, 1e-6)
        self.progress.update(self.task, advance=n_bytes, rate=f"{rate:.1f} MB/s")


def bar(console: Console, *texts: str, count: bool = True) -> Progress:
    """A progress bar with the given columns and the time left; nothing where there is no terminal."""
    counted = [MofNCompleteColumn()] if count else []
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        *counted,
        *(TextColumn(text) for text in texts),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=not console.is_terminal,
        disable=not console.is_terminal,
    )
