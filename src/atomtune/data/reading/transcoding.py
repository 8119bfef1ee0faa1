"""Transcoding: text files in UTF-16 and UTF-32, as spreadsheets write them, converted to UTF-8 while they are read."""

import codecs
import io
from typing import Any, BinaryIO

from atomtune.errors import BadData

STEP_BYTES = 64 * 2**10
#: Bytes examined to detect the encoding of a file without a byte-order mark.
_LOOKED_AT = 256
_MARKS = (
    ("utf-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),  # first: UTF-32 LE's mark begins with UTF-16 LE's
    ("utf-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
)


def encoding_of(head: bytes) -> str:
    """Detect the encoding from a file's first bytes: from its byte-order mark, or from zero bytes next to ASCII."""
    for encoding, marks in _MARKS:
        if head.startswith(marks):
            return encoding
    # "id" in UTF-16:  little-endian 69 00 64 00,  big-endian 00 69 00 64
    even_zeros = head[0:_LOOKED_AT:2].count(0)
    odd_zeros = head[1:_LOOKED_AT:2].count(0)
    enough = max(4, len(head[:_LOOKED_AT]) // 8)  # one character in four is ASCII
    if odd_zeros >= enough and odd_zeros > 8 * even_zeros:
        return "utf-16-le"
    if even_zeros >= enough and even_zeros > 8 * odd_zeros:
        return "utf-16-be"
    return "utf-8"


def as_utf8(stream: BinaryIO, encoding: str, name: str) -> BinaryIO:
    """The stream's text as UTF-8; reading raises BadData at the line whose bytes are not valid in `encoding`."""
    return io.BufferedReader(_Transcoded(stream, encoding, name), STEP_BYTES)


class _Transcoded(io.RawIOBase):
    def __init__(self, stream: BinaryIO, encoding: str, name: str) -> None:
        self._stream, self._encoding, self._name = stream, encoding, name
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self._waiting = b""  # UTF-8 that is not read yet
        self._line = 1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._waiting:
            raw = self._stream.read(STEP_BYTES)
            try:
                text = self._decoder.decode(raw, final=not raw)
                self._waiting = text.encode("utf-8")
            except UnicodeDecodeError as error:
                before = error.object[: error.start].decode(self._encoding, "ignore")
                line = self._line + before.count("\n")
                raise BadData(
                    f"{self._name}:{line}: not {self._encoding.upper()}, as the file begins. It is incomplete or "
                    "damaged: write it again, as UTF-8."
                ) from None
            self._line += text.count("\n")
            if not raw:
                break
        part = self._waiting[: len(buffer)]
        self._waiting = self._waiting[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)
