"""Console: the one way a command speaks in the terminal, and the bars it draws there."""

import contextlib
import os
import sys
import time

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Console(rich.console.Console):
    """What the user reads: plain lines, notices, and rich's tables and bars.

    speaks: False on every rank but the first.
    stderr: True where standard output is the result (`--json`, a chat's answers).
    """

    def __init__(self, *, speaks: bool = True, stderr: bool = False) -> None:
        super().__init__(quiet=not speaks, stderr=stderr, highlight=False)
        self.notices: list[str] = []

    def say(self, text: str, style: str | None = None) -> None:
        """One text, exactly as it is: `[` begins no markup."""
        self.print(text, style=style, markup=False, soft_wrap=True)

    def notice(self, text: str) -> None:
        """Something the user should know and need not answer; kept for run.json."""
        self.notices.append(text)
        self.say(f"note: {text}", style="yellow")

    def reading_progress(self, total_bytes: int, what: str) -> "ReadingProgress":
        return ReadingProgress(self, total_bytes, what)

    def on_broken_pipe(self) -> None:
        """The reader of the output may leave, as `| head` does; the run goes on."""
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class ReadingProgress:
    """A bar over the bytes of a file."""

    def __init__(self, console: Console, total_bytes: int, what: str) -> None:
        self.progress = progress_bar(console, "{task.fields[rate]}", count=False)
        self.task = self.progress.add_task(what, total=total_bytes, rate="")
        self.began, self.bytes_read = time.perf_counter(), 0

    def __enter__(self) -> "ReadingProgress":
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def advance(self, n_bytes: int) -> None:
        self.bytes_read += n_bytes
        seconds = max(time.perf_counter() - self.began, 1e-6)
        self.progress.update(self.task, advance=n_bytes, rate=f"{self.bytes_read / 2**20 / seconds:.1f} MB/s")


def progress_bar(console: Console, *texts: str, count: bool = True) -> Progress:
    """A progress bar with the given columns and the time left; nothing where there is no terminal."""
    steps = [MofNCompleteColumn()] if count else []
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        *steps,
        *(TextColumn(text) for text in texts),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=not console.is_terminal,
        disable=not console.is_terminal,
    )
