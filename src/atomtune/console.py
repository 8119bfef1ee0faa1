"""Console: the one way a command speaks in the terminal, and the bars it draws there.

Law: no character of a file, a name or a message gives the terminal an order; it is shown as `\\x1b` instead.
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

#: What a terminal obeys instead of showing it: C0 and C1 control characters, all but tab and line end, and the marks
#: that turn the direction of writing or end a line.
_ORDERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_PASSWORD = re.compile(r"(\w:/{1,2})[^\s/@]+@")
#: A line that is a command of ours; it is left whole, so that it can be copied.
_COMMAND = re.compile(r"  (atomtune|\S+ -m atomtune) ")
#: A last column that is narrower than this, in cells, goes on at the left.
_NARROWEST = 20
#: What a line may end behind: spaces, a word, or one character of Chinese or Japanese with the marks around it.
_WIDE = "\u2e80-\u9fff\uf900-\ufaff\uff01-\uff60"
_OPENING, _CLOSING = "（「『《〈【“‘", "）」』》〉】”’、。，；：！？…"
_WORDS = re.compile(
    f" +|[{_OPENING}]*[{_WIDE}][{_CLOSING}]*|[^ {_WIDE}{_OPENING}{_CLOSING}]+[{_CLOSING}]*|[{_OPENING}{_CLOSING}]+"
)


class Console(rich.console.Console):
    """What the user reads: plain lines, notices, and rich's tables and bars.

    speaks: False on every rank but the first.
    stderr: True where standard output is the result (`--json`, a chat's answers).
    """

    def __init__(self, *, speaks: bool = True, stderr: bool = False) -> None:
        super().__init__(quiet=not speaks, stderr=stderr, highlight=False, markup=False, emoji=False)
        if self.width < 1:  # COLUMNS=0, as some containers and editors set it: rich would print nothing at all
            self.width = shutil.get_terminal_size().columns
        self.notices: list[str] = []

    @property
    def draws(self) -> bool:
        """Whether a line can be drawn over: on a terminal, but not on a plain one (TERM=dumb, as in Emacs)."""
        return self.is_terminal and not self.is_dumb_terminal

    def say(self, text: str, style: str | None = None, *, wrap: bool = True) -> None:
        """One text in the language that is spoken: `[` begins no markup. On a terminal its lines end at a word's end.

        wrap  False leaves a long line to the terminal, so that a command in it can be copied whole
        """
        text = controls_shown(translated(text, is_ours=False))
        if wrap and self.is_terminal:
            lines = text.split("\n")
            text = "\n".join(line if _COMMAND.match(line) else wrapped(line, self.width) for line in lines)
        self.print(text, style=style, soft_wrap=True)

    def columns(self, rows: Sequence[Sequence[str]]) -> None:
        """Rows whose cells stand below each other; on a terminal the last one wraps below itself.

        The last cell is a sentence; those before it are names and figures, which stay as they are in any language.
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
        """What a user may want to run now: commands on lines of their own, each to be copied as it stands."""
        self.say(translated("\nNext:"))
        self.say("\n".join(f"  {command}" for command in commands), wrap=False)

    def notice(self, text: str) -> None:
        """Something the user should know and need not answer; kept for run.json."""
        self.notices.append(text)
        self.say(translated("note: ") + translated(text), style="yellow")

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """All that rich is about to write, cells of tables and bars too, with no order to the terminal but rich's."""
        for segment in super().render(renderable, options):
            if segment.control or not _ORDERS.search(segment.text):
                yield segment
            else:
                yield Segment(controls_shown(segment.text), segment.style)

    def reading_progress(self, total_bytes: int, what: str) -> "ReadingProgress":
        return ReadingProgress(self, total_bytes, what)

    def on_broken_pipe(self) -> None:
        """The reader of the output may leave, as `| head` does; the run goes on."""
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def program() -> str:
    """`atomtune`, or how it is called where it is not on the PATH: what is said to do next must work as it stands."""
    return "atomtune" if shutil.which("atomtune") else f"{shlex.quote(sys.executable)} -m atomtune"


def as_command(words: Iterable[str]) -> str:
    """The words behind `atomtune` as a command that can be copied."""
    return f"{program()} {shlex.join(words)}"


class LastingStream:
    """A standard stream that a command outlives: what cannot be written any more is lost, and is known to be.

    The reader of a pipe may leave, as `| head` does; the disk under a log may be full. Neither ends a run.
    error  why it cannot be written; None as long as it can
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
        """From here on nothing is written; what waits in the buffer goes nowhere, at the interpreter's end too."""
        self.error = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # asked for before __init__ has set it
            raise AttributeError(name)
        return getattr(self.stream, name)


def shortened(text: str, most: int = 200) -> str:
    """The beginning of a text that only reminds of it."""
    return text if len(text) <= most else f"{text[:most]}…"


def controls_shown(text: str) -> str:
    """A text whose control characters are shown, not obeyed: `\\x1b`, `\\u202e`. Tabs and line ends stay."""
    return _ORDERS.sub(lambda order: order.group().encode("unicode_escape").decode("ascii"), text)


def without_passwords(text: str) -> str:
    """A message whose addresses hold no `user:password@`. Of `https://` a path keeps one slash."""
    return _PASSWORD.sub(r"\1…@", text)


def print_json(value: object) -> None:
    """A command's result, on one line of standard output; what reads it gets the very same value."""
    # Where the output has no 灯, JSON's own \u706f is written; a stream's way to show it is no JSON.
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    line = json.dumps(value, ensure_ascii=not is_unicode)
    print(_ORDERS.sub(lambda order: f"\\u{ord(order.group()):04x}", line))


def wrapped(line: str, width: int, *, indent: int | None = None, long_words_apart: bool = False) -> str:
    """A line as several that end at a word's end; indent: of all but the first, where not as that.

    A word that is longer than a line stays where it is, or with `long_words_apart` begins a line: the terminal breaks
    it without a line end, so a path or an address can be copied.
    """
    if indent is None:
        indent = min(len(line) - len(line.lstrip(" ")), width // 2)
    lines, current, gap = [], "", ""
    cells = 0  # that `current` takes
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
        if cells > width and not long_words_apart:  # broken by the terminal, and the next word goes on there
            cells %= width
        gap = ""
    return "\n".join([*lines, current])


class ReadingProgress:
    """A bar over the bytes of a file."""

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


#: A terminal with so many columns has room for a long bar and all figures beside it.
WIDE = 110
#: One with fewer has none for a bar: figures come first.
NARROW = 64


def progress_bar(console: Console, *texts: str, count: bool = True, left: str = "") -> Progress:
    """A progress bar with the given columns and the time left, gone when it is done; nothing without a terminal.

    left: a column that says the time left, where it is not what the steps so far took on average
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
