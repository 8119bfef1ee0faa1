"""Laws of Parquet and Arrow: rows are read as written and numbered from 1; memory does not grow with the file."""

import datetime
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from atomtune.data.reading import arrow_rows
from atomtune.data.reading.arrow_rows import read_batches
from atomtune.data.reading.raw import MOST_LEVELS, RawRecord
from atomtune.data.reading.sources import size_of
from atomtune.data.records import Refusal
from atomtune.errors import BadData
from tests.reading import read_values

ROWS = [
    {
        "instruction": f"第{n}个🙂" if n % 7 else None,
        "messages": [{"role": "user", "content": "x" * (n % 5)}] * (n % 3),
        "meta": {"score": n / 2, "day": datetime.date(2024, 1, 1 + n % 28)},
        "image": b"\x89PNG" * (n % 2),
    }
    for n in range(2345)
]
TABLE = pyarrow.Table.from_pylist(ROWS)


def parquet(path: Path) -> None:
    pyarrow.parquet.write_table(TABLE, path, row_group_size=700)


def arrow_file(path: Path) -> None:
    with pyarrow.ipc.new_file(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=1500)


def arrow_stream(path: Path) -> None:
    with pyarrow.ipc.new_stream(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=1500)


WRITE = {"parquet": parquet, "arrow": arrow_file, "stream.arrow": arrow_stream}


@pytest.fixture(params=WRITE)
def written(request, tmp_path: Path) -> Path:
    path = tmp_path / f"train.{request.param}"
    WRITE[request.param](path)
    return path


def test_rows_are_read_as_written_and_numbered_from_one(written):
    # Lists, structs, dates, bytes and nulls; batches end inside row groups, and row groups inside batches.
    assert list(read_values(written)) == [RawRecord(row, f"{written.name}:{n}") for n, row in enumerate(ROWS, 1)]


def test_progress_adds_up_to_the_size_of_the_file(written):
    seen: list[int] = []
    list(read_values(written, seen.append))
    assert sum(seen) == size_of(written) == written.stat().st_size
    assert min(seen) >= 0 and len(seen) > 1


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused_with_the_remedy(written, share):
    written.write_bytes(written.read_bytes()[: int(written.stat().st_size * share)])
    with pytest.raises(BadData, match=rf"{written.name}: .* cannot be read(.|\n)*download or write it again"):
        list(read_values(written))


def test_a_corrupted_file_is_refused_without_a_crash(written):
    whole = bytearray(written.read_bytes())
    whole[len(whole) // 3 : len(whole) // 3 + 4000] = b"\xff" * 4000
    written.write_bytes(whole)
    with pytest.raises(BadData, match=rf"{written.name}: .* cannot be read"):
        list(read_values(written))


def test_only_the_row_with_invalid_utf_8_is_refused(tmp_path: Path):
    # Other programs write Latin-1 into string columns; pyarrow fails only when such a value is read.
    raw = pyarrow.array([b"good", b"caf\xe9", b"good too"], type=pyarrow.binary())
    texts = pyarrow.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"output": texts}), tmp_path / "a.parquet")
    first, wrong, last = read_values(tmp_path / "a.parquet")
    assert (first, last) == (
        RawRecord({"output": "good"}, "a.parquet:1"),
        RawRecord({"output": "good too"}, "a.parquet:3"),
    )
    assert isinstance(wrong, Refusal) and wrong.origin == "a.parquet:2" and "not UTF-8 at byte 4" in wrong.reason


def test_a_duplicate_column_is_refused(tmp_path: Path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["output", "output"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BadData, match='column "output" appears twice'):
        list(read_values(tmp_path / "a.parquet"))


def test_a_table_without_rows_gives_no_records(tmp_path: Path):
    pyarrow.parquet.write_table(TABLE.slice(0, 0), tmp_path / "a.parquet")
    assert list(read_values(tmp_path / "a.parquet")) == []


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_an_html_page_with_a_parquet_or_arrow_name_is_refused(tmp_path: Path, name):
    # A failed download leaves such a file. Without this check, every line would be a broken record.
    (tmp_path / name).write_text("<!DOCTYPE html>\n<html>\n")
    with pytest.raises(BadData, match="a web page"):
        list(read_values(tmp_path / name))


def test_json_lines_with_a_parquet_name_are_read_as_json_lines(tmp_path: Path):
    (tmp_path / "a.parquet").write_text(json.dumps({"a": 1}) + "\n")
    assert list(read_values(tmp_path / "a.parquet")) == [RawRecord({"a": 1}, "a.parquet:1")]


@pytest.mark.slow
def test_one_large_row_group_is_read_in_little_memory(tmp_path: Path):
    # 190 MiB of incompressible text in one row group. pyarrow's defaults keep the group: 150 MiB more.
    path = tmp_path / "big.parquet"
    code = f"""if True:
        import random, pyarrow, pyarrow.parquet
        draw = random.Random(0)
        texts = pyarrow.array([draw.randbytes(500).hex() for _ in range(200_000)])
        pyarrow.parquet.write_table(pyarrow.table({{"output": texts}}), {str(path)!r}, use_dictionary=False,
                                    row_group_size=1 << 30, compression="none")
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    code = """if True:
        import resource, sys
        from pathlib import Path
        from atomtune.data.reading.jsonl import parse_chunk
        from atomtune.data.reading.sources import read_files
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        before = peak()
        chunks = (chunk for file in read_files(Path(sys.argv[1])) for chunk in file.chunks)
        print(sum(1 for chunk in chunks for _ in parse_chunk(chunk)), peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    rows, mebibytes = map(int, done.stdout.split())
    assert rows == 200_000
    assert mebibytes < 80


def test_a_dictionary_of_a_huge_value_is_not_repeated_in_memory(tmp_path: Path):
    # 1,000 rows of one 8 MB text: a file of a kilobyte, but 8 GB in memory.
    path = tmp_path / "swollen.parquet"
    text = pyarrow.array(["y" * 8_000_000])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10, pyarrow.int32()), text)
    pyarrow.parquet.write_table(pyarrow.table({"output": column}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(BadData, match=r'swollen.parquet: column "output" unpacks to more than 200 times'):
        list(read_values(path))
    # The message's remedy.
    pyarrow.parquet.write_table(pyarrow.table({"output": column}), path, compression="zstd", use_dictionary=False)
    assert [len(row.value["output"]) for row in read_values(path)] == [8_000_000] * 10
    # A long text of one letter in a small file, and one short text in very many rows, are fine.
    pyarrow.parquet.write_table(pyarrow.table({"output": ["y" * 100_000] * 3}), path, compression="zstd")
    assert [len(row.value["output"]) for row in read_values(path)] == [100_000] * 3
    pyarrow.parquet.write_table(pyarrow.table({"output": ["the same"] * 100_000}), path, compression="zstd")
    assert sum(1 for _ in read_values(path)) == 100_000


REPEATED = {
    "dictionary": lambda rows: pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, "int32"), ["z" * 10**6]),
    "run": lambda rows: pyarrow.RunEndEncodedArray.from_arrays([rows], ["z" * 10**6]),
    "dictionary of lists": lambda rows: pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * rows, "int32"), pyarrow.array([["z" * 10**6]])
    ),
    "dictionary in a list": lambda rows: listed(REPEATED["dictionary"](rows)),
    "dictionary in a struct": lambda rows: pyarrow.StructArray.from_arrays([REPEATED["dictionary"](rows)], ["text"]),
    "dictionary in a list of structs": lambda rows: listed(REPEATED["dictionary in a struct"](rows)),
}


def listed(column: pyarrow.Array) -> pyarrow.Array:
    """Each value in a list of its own."""
    return pyarrow.ListArray.from_arrays(pyarrow.array(range(len(column) + 1), "int32"), column)


@pytest.mark.parametrize("kind", REPEATED)
@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_rows_that_expand_far_beyond_the_file_size_are_refused(tmp_path: Path, kind: str, ending: str):
    # 5,000 records that share one text of a megabyte, in a file of two: 5 billion characters to encode.
    path = tmp_path / f"swollen.{ending}"
    table = pyarrow.table({"output": REPEATED[kind](5000)})
    if ending == "arrow":
        arrow_of(path, table)
    elif kind in ("run", "dictionary of lists"):
        pytest.skip("Parquet has no such column")
    else:
        pyarrow.parquet.write_table(table, path, compression="none")
    with pytest.raises(BadData, match="take more than 200 times the file's size"):
        list(read_values(path))


def test_repeated_texts_are_counted_over_all_batches(tmp_path: Path, monkeypatch):
    # Each batch alone is within the limit.
    monkeypatch.setattr(arrow_rows, "FREE_BYTES", 2**20)
    path = tmp_path / "swollen.arrow"
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10_000, "int32"), ["z" * 5000])
    table = pyarrow.table({"output": texts})
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    with pytest.raises(BadData, match=r"swollen\.arrow:\d{4}: the rows take more than 200 times the file's size"):
        list(read_values(path))


# --- nulls ------------------------------------------------------------------------------------------------------------

CALLS = [
    {"messages": [{"role": "assistant", "arguments": {"city": "北京"}}], "tools": [{"properties": {"city": {"a": 1}}}]},
    {"messages": [{"role": "assistant", "arguments": {"code": "600000", "days": 5}}], "tools": [{"properties": {}}]},
    {"messages": [{"role": "assistant", "arguments": {}}], "tools": []},
]


def arrow_of(path: Path, table: pyarrow.Table) -> None:
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def stream_of(path: Path, table: pyarrow.Table) -> None:
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.parquet", lambda path, table: pyarrow.parquet.write_table(table, path)),
        ("a.arrow", arrow_of),
        ("b.arrow", stream_of),
    ],
)
def test_nulls_that_arrow_adds_to_structs_are_dropped(tmp_path, name, write):
    # Arrow adds null for missing keys: {"city": "北京", "code": null, "days": null} was trained as a call's arguments.
    write(tmp_path / name, pyarrow.Table.from_pylist(CALLS))
    assert [raw.value for raw in read_values(tmp_path / name)] == CALLS


@pytest.mark.parametrize("list_of", [pyarrow.large_list, lambda kind: pyarrow.list_(kind, 1)], ids=["large", "fixed"])
def test_nulls_that_arrow_adds_are_dropped_in_every_kind_of_list(tmp_path, list_of):
    # Polars writes large lists.
    turns = [[{"role": "assistant", "arguments": {"city": "北京"}}], [{"role": "assistant", "arguments": {"days": 5}}]]
    arguments = pyarrow.struct([("city", pyarrow.string()), ("days", pyarrow.int64())])
    turn = pyarrow.struct([("role", pyarrow.string()), ("arguments", arguments)])
    table = pyarrow.table({"messages": pyarrow.array(turns, list_of(turn))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [row.value["messages"] for row in read_values(tmp_path / "a.parquet")] == turns


def test_nulls_that_arrow_adds_to_a_saved_data_set_are_dropped(tmp_path):
    datasets.Dataset.from_list(CALLS).save_to_disk(str(tmp_path / "saved"))
    assert [raw.value for raw in read_values(tmp_path / "saved")] == CALLS


def test_nulls_that_arrow_did_not_add_are_kept(tmp_path):
    # Nulls of a column, in a list, in a map and in JSON text are real; Arrow adds none there.
    rows = pyarrow.table(
        {
            "output": pyarrow.array([None, "b"]),
            "history": pyarrow.array([[["a", None]], None]),
            "labels": pyarrow.array([[("k", None)], []], pyarrow.map_(pyarrow.string(), pyarrow.string())),
            "arguments": pyarrow.array(['{"code": null}', "{}"]),
            "turns": pyarrow.array([[{"a": "x"}, None], None]),
        }
    )
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
    first, second = (raw.value for raw in read_values(tmp_path / "a.parquet"))
    assert first == {
        "output": None,
        "history": [["a", None]],
        "labels": [("k", None)],
        "arguments": '{"code": null}',
        "turns": [{"a": "x"}, None],
    }
    assert (second["history"], second["turns"]) == (None, None)


@pytest.mark.parametrize(
    "times",
    [
        pyarrow.array([2**62, 0], pyarrow.timestamp("us")),  # the year 148,108
        pyarrow.array([0, 2**60], pyarrow.duration("s")),
        pyarrow.array([2**30, 0], pyarrow.date32()),
        pyarrow.array([0, 0], pyarrow.timestamp("s", "Nowhere/Land")),
    ],
    ids=str,
)
def test_a_time_that_python_cannot_represent_refuses_its_row(tmp_path: Path, times):
    pyarrow.parquet.write_table(pyarrow.table({"output": ["a", "b"], "time": times}), tmp_path / "t.parquet")
    rows = list(read_values(tmp_path / "t.parquet"))
    assert len(rows) == 2
    refused = [row for row in rows if isinstance(row, Refusal)]
    assert refused and all("a value that cannot be read" in row.reason for row in refused)


def test_a_too_deeply_nested_file_is_refused(tmp_path: Path):
    # By pyarrow itself, if it has a limit.
    kind: pyarrow.DataType = pyarrow.int64()
    for _ in range(300):
        kind = pyarrow.list_(kind)
    pyarrow.parquet.write_table(pyarrow.table({"output": pyarrow.nulls(1, kind)}), tmp_path / "a.parquet")
    with pytest.raises(BadData, match="nested"):
        list(read_values(tmp_path / "a.parquet"))


@pytest.mark.parametrize("nested", [pyarrow.list_, lambda kind: pyarrow.struct([("x", kind)])], ids=["list", "struct"])
def test_a_too_deeply_nested_column_is_refused_by_name(nested):
    kind: pyarrow.DataType = pyarrow.int64()
    for _ in range(MOST_LEVELS + 1):
        kind = nested(kind)
    (batch,) = pyarrow.table({"deep": pyarrow.nulls(1, kind)}).to_batches()
    with pytest.raises(BadData, match='a: column "deep": lists or objects are nested too deeply'):
        list(read_batches(iter([batch]), "a", 0, lambda rows: None))


def test_a_column_name_that_is_not_utf_8_is_reported(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"output": ["a"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"output", b"outp\xff\xff"))
    with pytest.raises(BadData, match=r"a\.parquet: Parquet that cannot be read"):
        list(read_values(path))


def test_metadata_with_a_row_count_of_zero_loses_no_rows(tmp_path: Path):
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"output": ["a", "b"]}), path)
    content = path.read_bytes()
    place = content.rindex(b"\x16\x04\x19")  # in the footer: the number of rows, 2, and then the row groups
    path.write_bytes(content[:place] + b"\x16\x00\x19" + content[place + 3 :])
    assert [row.value for row in read_values(path)] == [{"output": "a"}, {"output": "b"}]
