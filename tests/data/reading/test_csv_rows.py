"""Laws of tables: what the csv module writes is read back, each row with its first line, and no row is lost."""

import codecs
import csv
import io
import json
import random
from pathlib import Path

import pytest

from atomtune.data.reading import csv_rows
from atomtune.data.reading.csv_rows import columns_of, read_table
from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import Refusal
from atomtune.errors import BadData
from tests.reading import read_values

ALPHABET = ["a", "长", "🙂", '"', ",", "\t", ";", "\n", "\r\n", " ", "'", "\\", "\u2028"]


def read(content: bytes) -> list[RawRecord | Refusal]:
    return list(read_table(io.BytesIO(content), "a.csv"))


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("seed", range(10))
def test_rows_are_read_as_written_with_their_first_line_number(separator, seed):
    # Catches numbering rows instead of lines, and changed newlines inside cells.
    draw = random.Random(seed)
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator=draw.choice(["\n", "\r\n"]))
    writer.writerow(["instruction", "input", "output"])
    expected = []
    for _ in range(50):
        cells = ["".join(draw.choices(ALPHABET, k=draw.randrange(9))) for _ in range(3)]
        line = out.getvalue().count("\n") + 1
        if any(cell.strip() for cell in cells):  # a row of blank cells is skipped
            row = dict(zip(("instruction", "input", "output"), cells, strict=True))
            expected.append(RawRecord(row, f"a.csv:{line}"))
        writer.writerow(cells)
    assert read(out.getvalue().encode("utf-8")) == expected
    assert read(out.getvalue().encode("utf-8-sig")) == expected


def test_an_empty_cell_is_empty_text_and_a_number_stays_text():
    # Catches pandas' defaults: nan for an empty cell and for the surname NA, 7.0 for 007.
    (found,) = read(b"instruction,input,output\nNA,,007\n")
    assert found.value == {"instruction": "NA", "input": "", "output": "007"}


@pytest.mark.parametrize("row", ["only one,two", "one,two,three,four", "a text, not quoted,,x"])
def test_only_the_row_with_the_wrong_number_of_cells_is_refused(row):
    first, wrong, last = read(f"instruction,input,output\na,,b\n{row}\nc,,d\n".encode())
    assert (first.value["output"], last.value["output"]) == ("b", "d")
    assert wrong.origin == "a.csv:3" and "3 columns in the header" in wrong.reason


def test_blank_lines_are_skipped_but_counted_in_line_numbers():
    found = read(b"\n\ninstruction,output\n\na,b\n  \n\nc,d\n\n")
    assert [one.origin for one in found] == ["a.csv:5", "a.csv:8"]


def test_a_row_that_is_not_utf_8_is_refused_whole_and_alone():
    # The bad byte is in the second of three lines of one cell; the row must still end at its real end.
    first, wrong, last = read(b'instruction,output\na,b\nc,"x\n' + "你好".encode("gbk") + b'\ny"\nd,e\n')
    assert (first.value["output"], last) == ("b", RawRecord({"instruction": "d", "output": "e"}, "a.csv:6"))
    assert wrong.origin == "a.csv:3" and "iconv -f GB18030" in wrong.reason


def test_nul_bytes_are_refused():
    (wrong,) = read(b"instruction,output\na,b\0c\n")
    assert "NUL bytes" in wrong.reason


def test_a_quote_inside_a_quoted_cell_is_refused_with_its_line():
    first, *_ = read(b'instruction,output\n"say "hi" twice",b\nc,d\n')
    assert isinstance(first, Refusal) and first.origin == "a.csv:2" and '""' in first.reason


def test_a_lone_carriage_return_is_refused():
    # Otherwise the row would become two, and a file with such line ends would be a header without rows.
    first, last = read(b"instruction,output\na,b\rc,d\ne,f\n")
    assert first.origin == "a.csv:2" and "carriage return" in first.reason
    assert last == RawRecord({"instruction": "e", "output": "f"}, "a.csv:3")
    with pytest.raises(BadData, match=r"a\.csv:1: .*carriage return"):
        read(b"instruction,output\ra,b\r")


def test_an_unclosed_quote_is_reported_with_its_line():
    # csv would read the rest of the file as one cell.
    with pytest.raises(BadData, match=r"a\.csv:3: a quote opens in this row and never closes"):
        read(b'instruction,output\na,b\nc,"d\ne,f\ng,h\n')


def test_a_row_beyond_the_size_limit_stops_reading_early(monkeypatch):
    monkeypatch.setattr(csv_rows, "LONGEST_LINE", 1000)
    stream = io.BytesIO(b'instruction,output\na,"' + b"x\n" * 100_000)
    with pytest.raises(BadData, match="an earlier quote may never close"):
        list(read_table(stream, "a.csv"))
    assert stream.tell() < 2000


def test_a_cell_of_a_megabyte_is_read():
    # csv's own limit is 131,072 characters.
    (found,) = read(b"instruction,output\na," + b"x" * 1_000_000 + b"\n")
    assert len(found.value["output"]) == 1_000_000


def test_a_header_is_read_without_the_white_space_around_its_names():
    (row,) = read(b" instruction ,\toutput\na, b \n")
    assert row.value == {"instruction": "a", "output": " b "}
    (row,) = read(b'"\ninstruction",output\na,b\n')
    assert row == RawRecord({"instruction": "a", "output": "b"}, "a.csv:3")


def test_a_header_that_is_not_utf_8_is_refused():
    with pytest.raises(BadData, match=r"a\.csv:1  not UTF-8 at byte 4"):
        read(b"caf\xe9,output\na,b\n")


def test_a_higher_limit_of_the_process_for_cells_is_left_as_it_is():
    limit = csv.field_size_limit(10**9)
    try:
        read(b"instruction,output\na,b\n")
        assert csv.field_size_limit() == 10**9
    finally:
        csv.field_size_limit(limit)


def test_a_duplicate_column_is_refused():
    with pytest.raises(BadData, match=r'a\.csv:1: column "output" appears twice'):
        read(b"output,instruction,output\na,b,c\n")


# --- what a spreadsheet writes around its table -----------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("first", ["sep={}", '"sep={}"', "SEP={}\r"])
def test_excels_sep_line_sets_the_separator_and_is_not_the_header(separator, first):
    table = f"{first.format(separator)}\ninstruction{separator}output\na{separator}b\n"
    for content in (table.encode(), codecs.BOM_UTF8 + table.encode()):
        assert read(content) == [RawRecord({"instruction": "a", "output": "b"}, "a.csv:3")]


def test_a_column_named_sep_is_read_as_a_column():
    assert read(b"sep=ab\nx\n") == [RawRecord({"sep=ab": "x"}, "a.csv:2")]
    assert read(b"sep,output\na,b\n") == [RawRecord({"sep": "a", "output": "b"}, "a.csv:2")]


@pytest.mark.parametrize("blank", [",", ",,", " , ", '"",""', '"\n",'])
def test_a_row_of_blank_cells_is_skipped(blank):
    # Such rows were once refused with "output is empty", which stopped the run.
    found = read(f"instruction,output\na,b\n{blank}\nc,d\n".encode())
    assert [raw.value["output"] for raw in found] == ["b", "d"]
    assert found[1].origin == f"a.csv:{4 + blank.count(chr(10))}"


def test_empty_columns_at_the_right_are_ignored():
    # Two empty names were once reported as "column appears twice".
    rows = read(b"instruction,input,output,,\na,,b,,\nc,d,e\nf,,,,\n")
    assert [list(raw.value.values()) for raw in rows] == [["a", "", "b"], ["c", "d", "e"], ["f", "", ""]]
    (refused,) = read(b"instruction,output,,\na,b,c,\n")
    assert isinstance(refused, Refusal) and "3 cells, but 2 columns" in refused.reason


@pytest.mark.parametrize("blank", [",", ",,", " ; ", '"",""', ",\r"])
def test_a_row_of_blank_cells_above_the_header_is_skipped(blank):
    # Every row was once refused, because such a header has no names.
    for first in ("", "sep=,\n"):
        origin = f"a.csv:{3 + bool(first)}"
        content = f"{first}{blank}\ninstruction,output\na,b\n".encode()
        assert read(content) == [RawRecord({"instruction": "a", "output": "b"}, origin)]


def test_empty_columns_at_the_left_are_not_reported_as_duplicates():
    # Two empty names were once reported as "column appears twice".
    (row,) = read(b",,instruction,output\n,,a,b\n")
    assert row.value == {"": "", "instruction": "a", "output": "b"}
    numbered, refused = read(b",,instruction,output\n,7,a,b\n6,7,a,b\n")
    assert numbered.value == {"": "7", "instruction": "a", "output": "b"}
    assert isinstance(refused, Refusal) and "two columns without a name" in refused.reason


@pytest.mark.parametrize(
    ("header", "columns", "separator"),
    [
        ("instruction,output", ["instruction", "output"], ","),
        ("Instruction\tOutput", ["instruction", "output"], "\t"),
        ('"instruction";"out,put"', ["instruction", "out,put"], ";"),
        ("text", ["text"], ","),
        ("", [], ","),
    ],
)
def test_the_separator_that_gives_the_most_columns_is_chosen(header, columns, separator):
    assert columns_of(header) == (columns, separator)


def test_json_messages_in_a_cell_are_kept_as_text(tmp_path: Path):
    messages = json.dumps([{"role": "user", "content": "a,b"}])
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["messages"], [messages]])
    assert list(read_values(tmp_path / "a.csv")) == [RawRecord({"messages": messages}, "a.csv:2")]
