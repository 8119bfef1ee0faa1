"""Typed input: what is typed in a terminal, edited there, and the lines of a pipe."""

import codecs
import io
import sys
from collections.abc import Iterator, Sequence

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from atomtune.errors import BadData


def lines_of_pipe() -> Iterator[str]:
    """Each line of standard input, without its end. Raises BadData where it is no text, or cannot be read."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A locale with ASCII alone hands on each other byte as half a character, which no model takes.
        encoding = codecs.lookup(sys.stdin.encoding).name
        sys.stdin.reconfigure(encoding="utf-8" if encoding == "ascii" else encoding, errors="strict")
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper()
        raise BadData(f"standard input is not {encoding}: {error.reason}. Pass text in {encoding}.") from None
    except OSError as error:
        raise BadData(f"standard input cannot be read: {error.strerror}.") from None


class TypedInput:
    """What is typed: arrow keys edit it and bring earlier messages back, Enter sends, Alt+Enter makes a new line.

    Pasted lines come as one message. The history is that of this program alone; nothing typed is written to a disk.
    """

    def __init__(self, commands: Sequence[str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation="  ",
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            output=create_output(stdout=sys.stderr),  # standard output holds answers and nothing else
        )

    def __iter__(self) -> Iterator[str]:
        """Messages until Ctrl-D. Ctrl-C takes back what is being typed."""
        while True:
            try:
                yield self._session.prompt("> ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return


def _keys() -> KeyBindings:
    """Enter sends; Alt+Enter, and Ctrl-J as a terminal sends for it, makes a new line."""

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
