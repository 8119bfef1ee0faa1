"""CSV rows: each row of a CSV or TSV file as an object whose keys are the column names; every cell is text.

Law: the origin of a row is the line on which it begins. Quoted cells may contain separators, newlines and quotes
(written twice).
What a spreadsheet adds around the table is ignored: a first line `sep=;`, empty columns at the right, and rows of empty
cells.
"""

import codecs
import csv
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from atomtune.data.reading.raw import LONGEST_LINE, NUL_BYTES, RawRecord, encoding_reason
from atomtune.data.records import Refusal, RefusalKind
from atomtune.errors import BadData

SEPARATORS = (",", "\t", ";")
#: The characters of a row of empty cells: separators, white space and quotes.
_BLANK_CELLS = "".join(SEPARATORS) + ' "\r\n\ufeff'


def separator_line(line: str) -> str:
    """The separator that a line such as `sep=;` declares, Excel's convention; "" for any other line."""
    bare_line = line.lstrip("\ufeff").strip("\r\n ").strip('"')  # "sep=;" in quotes too
    name, _, separator = bare_line.partition("=")
    return separator if name.lower() == "sep" and len(separator) == 1 else ""


def columns_of(header: str, declared: str = "") -> tuple[list[str], str]:
    """The column names in lower case, and the separator that gives the most columns; a comma if none gives any.

    declared  the separator of a `sep=` line above the header, if there is one
    """
    separator = max(declared or SEPARATORS, key=lambda candidate: len(_cells(header, candidate)))
    return [name.lower() for name in _cells(header, separator)], separator


def _cells(header: str, separator: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([header], delimiter=separator, strict=True), [])]
    except csv.Error:  # with this separator the quotes do not match
        return []


def read_table(stream: BinaryIO, name: str) -> Iterator[RawRecord | Refusal]:
    """Every row as an object, or the reason why it is refused; rows of empty cells are skipped.

    Raises BadData for an unusable header and for a quote that is never closed.
    """
    # This limit applies to the whole process, so it is raised if needed, but never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    lines = _Lines(stream, name)
    separator = separator_line(lines.peek())
    if separator:
        lines.skip()
        lines.peek()
    else:
        _, separator = columns_of(lines.peek())
    rows = csv.reader(lines, delimiter=separator, strict=True)
    keys = _read_header(rows, lines)
    while True:
        lines.begin_row()
        origin = f"{name}:{lines.number + 1}"
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.ended:
                raise BadData(
                    f"{origin}: a quote opens in this row and never closes. Close it, or double it."
                ) from None
            yield Refusal(origin, _explain(error), RefusalKind.UNREADABLE)
            continue
        if any(cell.strip() for cell in cells):
            yield _read_row(keys, cells, lines.trouble, origin)


def _explain(error: csv.Error) -> str:
    if "new-line character" in str(error):
        return "not CSV: a carriage return outside quotes; lines end in \\n or \\r\\n"
    return f'not CSV: {error}; a quote inside a quoted cell is written twice: ""'


def _read_row(keys: list[str], cells: list[str], trouble: str, origin: str) -> RawRecord | Refusal:
    if trouble:
        return Refusal(origin, trouble, RefusalKind.UNREADABLE)
    while len(cells) > len(keys) and not cells[-1].strip():
        cells = cells[:-1]
    if len(cells) != len(keys):
        reason = (
            f"{len(cells)} cells, but {len(keys)} columns in the header; put a cell that holds the separator or a "
            "line break in quotes"
        )
        return Refusal(origin, reason, RefusalKind.UNREADABLE)
    record: dict[str, str] = {}
    for key, cell in zip(keys, cells, strict=True):
        if not key and record.get(key, "").strip():
            if cell.strip():
                return Refusal(
                    origin, "text in two columns without a name; name them in the header", RefusalKind.UNREADABLE
                )
            continue
        record[key] = cell
    return RawRecord(record, origin)


def _read_header(rows: Iterator[list[str]], lines: "_Lines") -> list[str]:
    """The column names, without empty ones at the right. Raises BadData for a header that cannot be used."""
    try:
        keys = [cell.strip() for cell in next(rows, [])]
    except csv.Error as error:
        raise BadData(f"{lines.name}:{lines.number}: the header is {_explain(error)}.") from None
    if lines.trouble:
        raise BadData(f"{lines.name}:{lines.number}  {lines.trouble}.")
    while keys and not keys[-1]:
        keys.pop()
    repeated = [key for key, count in Counter(keys).items() if count > 1 and key]
    if repeated:
        raise BadData(
            f'{lines.name}:{lines.number}: column "{repeated[0]}" appears twice in the header. Rename or remove one.'
        )
    return keys


class _Lines(Iterator[str]):
    """The lines of a table as text, numbered; a problem with a line is kept in `trouble` until its row is complete."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.name, self.number, self.trouble = name, 0, ""
        self.ended = False
        self._stream, self._row_bytes = stream, 0
        self._peeked: str | None = None

    def begin_row(self) -> None:
        self.trouble, self._row_bytes = "", 0

    def peek(self) -> str:
        """Look at the next line that has content, without consuming it: the header, or `sep=;`.

        Rows of empty cells above the table, as spreadsheets write them, are skipped.
        """
        if self._peeked is None:
            line = next(self, "")
            while not self.ended and not line.strip(_BLANK_CELLS) and line.count('"') % 2 == 0:
                line = next(self, "")
            self._peeked = line
        return self._peeked

    def skip(self) -> None:
        """Drop the line that `peek` returned."""
        self._peeked = None

    def __next__(self) -> str:
        if self._peeked is not None:
            line, self._peeked = self._peeked, None
            return line
        raw = self._stream.readline(LONGEST_LINE)
        if not raw:
            self.ended = True
            raise StopIteration
        self._row_bytes += len(raw)
        if self._row_bytes >= LONGEST_LINE:
            raise BadData(
                f"{self.name}:{self.number + 1}: the row that ends here is larger than {LONGEST_LINE // 10**6} MB; "
                "an earlier quote may never close."
            )
        self.number += 1
        return self._text(raw.removeprefix(codecs.BOM_UTF8) if self.number == 1 else raw)

    def _text(self, raw: bytes) -> str:
        """Decode the line. Invalid bytes are replaced, so that the row still ends at its end; `trouble` refuses it."""
        if b"\0" in raw:
            self.trouble = NUL_BYTES
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.trouble = encoding_reason(raw, error.start)
            return raw.decode("utf-8", "replace")
