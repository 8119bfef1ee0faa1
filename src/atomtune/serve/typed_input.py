"""Typed input: text typed and edited in a terminal, and the lines of a pipe."""

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
    """The lines of standard input without line ends. Raises BadData if it is not text or cannot be read."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # With an ASCII locale Python would decode other bytes to lone surrogates, which no tokenizer accepts. `-sig`
        # leaves out the byte order mark with which Windows begins text files.
        encoding = codecs.lookup(sys.stdin.encoding).name
        sys.stdin.reconfigure(encoding="utf-8-sig" if encoding in ("ascii", "utf-8") else encoding, errors="strict")
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper()
        raise BadData(f"standard input is not {encoding}: {error.reason}. Pass text in {encoding}.") from None
    except OSError as error:
        raise BadData(f"standard input cannot be read: {error.strerror}.") from None


class TypedInput:
    """Messages typed in a terminal: arrow keys edit and recall earlier ones, Enter sends, Alt+Enter makes a new line.

    Pasted lines become one message. The history lasts only as long as this program; nothing typed is written to a disk.
    """

    def __init__(self, commands: Sequence[str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation="  ",
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            output=create_output(stdout=sys.stderr),  # standard output is only for answers
        )

    def __iter__(self) -> Iterator[str]:
        """Messages until Ctrl-D. Ctrl-C discards what is being typed."""
        while True:
            try:
                yield self._session.prompt("> ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return


def _keys() -> KeyBindings:
    """Enter sends; Alt+Enter, or Ctrl-J, which some terminals send for it, makes a new line."""

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
