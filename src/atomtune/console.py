"""Console: prints everything that a command shows in the terminal, and draws its bars.

Law: no control character from a file, a name or a message takes effect in the terminal; it is shown as `\\x1b`.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import rich.console
from rich.cells import cell_len
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment

from atomtune.language import translated

#: Characters that a terminal obeys instead of showing: C0 and C1 control characters except tab and line feed, and marks
#: that change the direction of writing or end a line.
_ORDERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_PASSWORD = re.compile(r"(\w:/{1,2})[^\s/@]+@")
#: A line that is a command of ours; it is not wrapped, so that it can be copied.
_COMMAND = re.compile(r"  (atomtune|\S+ -m atomtune) ")
#: A last column with less room than this, in cells, continues at the left.
_NARROWEST = 20
#: Units after which a line may end: spaces, a word, or one Chinese or Japanese character with its punctuation.
_WIDE = "\u2e80-\u9fff\uf900-\ufaff\uff01-\uff60"
_OPENING, _CLOSING = "（「『《〈【“‘", "）」』》〉】”’、。，；：！？…"
_WORDS = re.compile(
    f" +|[{_OPENING}]*[{_WIDE}][{_CLOSING}]*|[^ {_WIDE}{_OPENING}{_CLOSING}]+[{_CLOSING}]*|[{_OPENING}{_CLOSING}]+"
)


class Console(rich.console.Console):
    """Prints lines, notices, and rich's tables and bars.

    speaks: False on all ranks except the first.
    stderr: True if standard output is for results (`--json`, answers of a chat).
    """

    def __init__(self, *, speaks: bool = True, stderr: bool = False) -> None:
        super().__init__(quiet=not speaks, stderr=stderr, highlight=False, markup=False, emoji=False)
        if self.width < 1:  # COLUMNS=0, set by some containers and editors: rich would print nothing
            self.width = shutil.get_terminal_size().columns
        self.notices: list[str] = []

    @property
    def draws(self) -> bool:
        """Whether a line can be overwritten: on a terminal, except a plain one (TERM=dumb, for example in Emacs)."""
        return self.is_terminal and not self.is_dumb_terminal

    def say(self, text: str, style: str | None = None, *, wrap: bool = True) -> None:
        """Print a text in the language in use. `[` is not markup; on a terminal, lines are wrapped between words.

        wrap  False: the terminal breaks long lines, so that a command in one can be copied
        """
        text = controls_shown(translated(text, is_ours=False))
        if wrap and self.is_terminal:
            lines = text.split("\n")
            text = "\n".join(line if _COMMAND.match(line) else wrapped(line, self.width) for line in lines)
        self.print(text, style=style, soft_wrap=True)

    def columns(self, rows: Sequence[Sequence[str]]) -> None:
        """Print rows in aligned columns; on a terminal the last column is wrapped below itself.

        The last cell is a sentence. The others are names and figures, which are not translated.
        """
        rows = [[*names, translated(sentence)] for *names, sentence in rows]
        widths = [max(map(cell_len, cells)) for cells in zip(*rows, strict=True)]
        for *cells, last in rows:
            start = "  " + "".join(
                controls_shown(cell) + " " * (width + 2 - cell_len(cell))
                for cell, width in zip(cells, widths, strict=False)
            )
            line = start + controls_shown(last)
            has_room = self.width - cell_len(start) >= _NARROWEST
            if self.is_terminal:
                line = wrapped(line, self.width, indent=cell_len(start) if has_room else 4)
            self.print(line, soft_wrap=True)

    def next_steps(self, commands: Iterable[str]) -> None:
        """Print commands that the user may want to run next, each on its own line, ready to copy."""
        self.say(translated("\nNext:"))
        self.say("\n".join(f"  {command}" for command in commands), wrap=False)

    def notice(self, text: str) -> None:
        """Print something the user should know; it is also kept for run.json."""
        self.notices.append(text)
        self.say(translated("note: ") + translated(text), style="yellow")

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """All output of rich, including cells of tables and bars, with control characters shown, except rich's own."""
        for segment in super().render(renderable, options):
            if segment.control or not _ORDERS.search(segment.text):
                yield segment
            else:
                yield Segment(controls_shown(segment.text), segment.style)

    def reading_progress(self, total_bytes: int, what: str) -> "ReadingProgress":
        return ReadingProgress(self, total_bytes, what)

    def on_broken_pipe(self) -> None:
        """Print nothing more if the reader of the output is gone, for example after `| head`; the run continues."""
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def program() -> str:
    """`atomtune`, or how to call it if it is not on the PATH, so that printed commands work as they are."""
    return "atomtune" if shutil.which("atomtune") else f"{shlex.quote(sys.executable)} -m atomtune"


def as_command(words: Iterable[str]) -> str:
    """The words after `atomtune` as a command that can be copied."""
    return f"{program()} {shlex.join(words)}"


class LastingStream:
    """A standard stream whose failure does not end the command; output that cannot be written is discarded.

    The reader of a pipe may be gone, for example after `| head`, or the disk with a log may be full.
    error  why it can no longer be written; None while it can
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                return self.stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.error is None:
            try:
                self.stream.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        """Stop writing, and send what is buffered to /dev/null, also at the interpreter's exit."""
        self.error = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # read before __init__ has set it
            raise AttributeError(name)
        return getattr(self.stream, name)


def shortened(text: str, most: int = 200) -> str:
    """The beginning of a text, as a reminder of the whole."""
    return text if len(text) <= most else f"{text[:most]}…"


def controls_shown(text: str) -> str:
    """A text with control characters made visible: `\\x1b`, `\\u202e`. Tabs and line feeds stay."""
    return _ORDERS.sub(lambda order: order.group().encode("unicode_escape").decode("ascii"), text)


def without_passwords(text: str) -> str:
    """A message with `user:password@` removed from addresses, also after `https:/`, as pathlib shortens `https://`."""
    return _PASSWORD.sub(r"\1…@", text)


def print_json(value: object) -> None:
    """Print a command's result on one line of standard output, so that a program reads exactly the same value."""
    # If the output cannot encode 灯, JSON's own \u706f is written; the stream's replacement would not be JSON.
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    line = json.dumps(value, ensure_ascii=not is_unicode)
    print(_ORDERS.sub(lambda order: f"\\u{ord(order.group()):04x}", line))


def wrapped(line: str, width: int, *, indent: int | None = None, long_words_apart: bool = False) -> str:
    """A line wrapped between words. indent: of all lines except the first; default: that of the line.

    A word longer than a line stays in its place or, with `long_words_apart`, starts a new line. The terminal breaks it
    without a line end, so a path or an address can be copied.
    """
    if indent is None:
        indent = min(len(line) - len(line.lstrip(" ")), width // 2)
    lines, current, gap = [], "", ""
    cells = 0  # width of `current`
    for word in _WORDS.findall(line):
        if word.isspace():
            gap += word
            continue
        word_cells = cell_len(word)
        is_first = not current.strip()
        may_move = word_cells <= width - indent or long_words_apart
        if cells + len(gap) + word_cells > width and not is_first and may_move:
            lines.append(current)
            current, cells, gap = " " * indent, indent, ""
        current += gap + word
        cells = cells + len(gap) + word_cells
        if cells > width and not long_words_apart:  # the terminal breaks it, and the next word continues there
            cells %= width
        gap = ""
    return "\n".join([*lines, current])


class ReadingProgress:
    """A progress bar over the bytes of a file."""

    def __init__(self, console: Console, total_bytes: int, what: str) -> None:
        self.progress = progress_bar(console, "{task.fields[rate]}", count=False)
        self.task = self.progress.add_task(translated(what), total=total_bytes, rate="")
        self.began, self.bytes_read = time.perf_counter(), 0

    def __enter__(self) -> "ReadingProgress":
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def advance(self, n_bytes: int) -> None:
        self.bytes_read += n_bytes
        seconds = max(time.perf_counter() - self.began, 1e-6)
        self.progress.update(self.task, advance=n_bytes, rate=f"{self.bytes_read / 1e6 / seconds:.1f} MB/s")


#: A terminal with this many columns has room for a long bar and all figures.
WIDE = 110
#: A narrower one has no room for a bar beside the figures.
NARROW = 64


def progress_bar(console: Console, *texts: str, count: bool = True, left: str = "") -> Progress:
    """A progress bar with these columns and the time left. It disappears when done, and needs a terminal.

    left: a column with the time left, if that is not estimated from the average step
    """
    draws = console.draws
    bar = [BarColumn(bar_width=28 if console.width >= WIDE else 8)] if console.width >= NARROW else []
    steps = [MofNCompleteColumn()] if count else []
    return Progress(
        TextColumn("{task.description}", markup=False),
        *bar,
        *steps,
        *(TextColumn(text, markup=False) for text in texts),
        TextColumn(left, markup=False) if left else TimeRemainingColumn(compact=True),
        TextColumn(translated("left"), markup=False),
        console=console,
        transient=True,
        disable=not draws,
    )
