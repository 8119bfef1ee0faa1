"""JSON array: the values of one large JSON array, parsed in a sliding window.

Memory is bounded by the longest value, which has the same limit as a line of JSONL.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from atomtune.data.reading.raw import (
    DECODER,
    LONGEST_LINE,
    TOO_DEEP,
    RawRecord,
    encoding_reason,
    json_reason,
    refuse_deep,
)
from atomtune.errors import BadData

_SPACE = re.compile(r"\s*")
WINDOW_BYTES = 2**20


class _Window:
    """The part of the text in memory: `text[at:]` is not parsed yet."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.text, self.at = "", 0
        self.ended = False
        self.name = name
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
        self._lines_read, self._bytes_read = 0, 0
        self._line, self._counted = 1, 0  # the line number at position `_counted` of `text`

    def line(self) -> int:
        """The line number at `at`."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def grow(self) -> None:
        """Drop the parsed text and read at least as much as is left, so that a long value takes linear time.

        Raises BadData for bytes that are not UTF-8.
        """
        self.line()  # count the lines before their text is dropped
        self.text, self.at, self._counted = self.text[self.at :], 0, 0
        raw = self._stream.read(max(WINDOW_BYTES, len(self.text)))
        try:
            self.text += self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            self._refuse_encoding(error, raw)
        self._lines_read += raw.count(b"\n")
        self._bytes_read += len(raw)
        self.ended = not raw

    def _refuse_encoding(self, error: UnicodeDecodeError, raw: bytes) -> NoReturn:
        content = error.object  # raw, after the start of a character from the previous read
        begin = content.rfind(b"\n", 0, error.start) + 1
        end = content.find(b"\n", error.start)
        line = self._lines_read + content.count(b"\n", 0, error.start) + 1
        at = self._bytes_read + len(raw) - len(content) + error.start
        bad_line = content[begin:end] if end >= 0 else content[begin:]
        raise BadData(f"{self.name}:{line}  {encoding_reason(bad_line, at)}.") from None

    def next_character(self) -> str:
        """Skip white space; `at` is then at the character that is returned, "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches the empty string
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.grow()

    def value(self) -> Any:
        """Parse the value that begins at `at` and move `at` after it. Raises BadData if that is not possible."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                refuse_deep(value, self.text.count("[", self.at, end) + self.text.count("{", self.at, end))
            except json.JSONDecodeError as error:
                if self.ended or not self._cut_off(error):
                    self.refuse(json_reason(error))
            except RecursionError:
                self.refuse(TOO_DEEP)
            except ValueError as error:
                self.refuse(str(error))
            else:
                if end + 2 < len(self.text) or self.ended:  # at the window's end, 12 may be the start of 12e+3
                    self.at = end
                    return value
            if len(self.text) - self.at > LONGEST_LINE:
                self.refuse(f"a value of more than {LONGEST_LINE // 10**6} MB")
            self.grow()

    def _cut_off(self, error: json.JSONDecodeError) -> bool:
        """Whether more text may resolve the error: no literal, number sign or escape is longer than 12 characters."""
        return error.pos >= len(self.text) - 12 or error.msg.startswith("Unterminated string")

    def refuse(self, why: str) -> NoReturn:
        raise BadData(f"{self.name}:{self.line()}: the JSON array breaks here: {why}.")


def read_array(stream: BinaryIO, name: str) -> Iterator[RawRecord]:
    """Every value of the array; its origin is the line it begins on, plus its number if another value begins there.

    Raises BadData if the array is not valid JSON.
    """
    window = _Window(stream, name)
    assert window.next_character() == "["
    window.at += 1
    closed = window.next_character() == "]"
    line_before, number = 0, 0
    while not closed:
        line, number = window.line(), number + 1
        origin = f"{name}:{line}"
        if line == line_before:  # origins must differ, and an array is often written on one line
            origin = f"{origin} value {number}"
        yield RawRecord(window.value(), origin)
        line_before = line
        mark = window.next_character()
        closed = mark == "]"
        if not closed:
            if mark != ",":
                window.refuse("expected a comma or the closing bracket")
            window.at += 1
            window.next_character()
    end = window.line()
    window.at += 1
    after = window.next_character()
    if after == "[":
        raise BadData(
            f"{name}:{window.line()}: a second JSON array; expected one array of records, or one record per line, such "
            'as {"messages": […]}.'
        )
    if after:
        raise BadData(f"{name}:{end}: text after the end of the JSON array; expected nothing after its ].")
