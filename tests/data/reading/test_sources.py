"""Laws of reading: every line is a value or a refusal with its line; an unreadable file gets an error with a remedy."""

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from atomtune.data.reading.jsonl import parse_chunk
from atomtune.data.reading.raw import Lines, RawRecord, is_deeper
from atomtune.data.reading.sources import (
    distinct_names,
    fingerprint_of,
    size_of,
    stamp_of,
    would_hold,
)
from atomtune.data.records import Refusal
from atomtune.errors import BadData
from atomtune.language import catalogue
from tests.reading import read_chunks, read_values

HELLO = {"instruction": "你好", "input": "", "output": "Hello"}
BYE = {"instruction": "再见", "input": "", "output": "Bye"}


def line(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def written(folder: Path, content: bytes, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def archive(content: bytes) -> bytes:
    """A tar archive with one file."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as files:
        entry = tarfile.TarInfo("train.jsonl")
        entry.size = len(content)
        files.addfile(entry, io.BytesIO(content))
    return whole.getvalue()


def refusals(path: Path) -> list[Refusal]:
    return [one for one in read_values(path) if isinstance(one, Refusal)]


# --- what is read ---------------------------------------------------------------------------------------------------


def test_every_line_is_a_value_with_its_number(tmp_path):
    # Catches numbering from 0, or by record instead of by line.
    path = written(tmp_path, line(HELLO) + line(BYE))
    assert list(read_values(path)) == [RawRecord(HELLO, "train.jsonl:1"), RawRecord(BYE, "train.jsonl:2")]


def test_a_missing_newline_at_the_end_loses_nothing(tmp_path):
    path = written(tmp_path, line(HELLO) + line(BYE).rstrip())
    assert [found.value for found in read_values(path)] == [HELLO, BYE]


def test_a_byte_order_mark_is_not_part_of_the_first_record(tmp_path):
    # Catches plain UTF-8 decoding: json refuses a text that begins with U+FEFF.
    path = written(tmp_path, codecs.BOM_UTF8 + line(HELLO) + line(BYE))
    assert [found.value for found in read_values(path)] == [HELLO, BYE]


def test_a_byte_order_mark_before_an_array_does_not_hide_the_array(tmp_path):
    path = written(tmp_path, codecs.BOM_UTF8 + json.dumps([HELLO, BYE]).encode())
    assert [found.value for found in read_values(path)] == [HELLO, BYE]


def test_windows_line_ends_change_neither_values_nor_numbers(tmp_path):
    path = written(tmp_path, (line(HELLO) + line(BYE)).replace(b"\n", b"\r\n"))
    assert list(read_values(path)) == [RawRecord(HELLO, "train.jsonl:1"), RawRecord(BYE, "train.jsonl:2")]


def test_blank_lines_are_skipped_but_counted_in_line_numbers(tmp_path):
    # Catches numbering values instead of lines, and a blank last line read as a broken record.
    path = written(tmp_path, b"\n" + line(HELLO) + b" \t\r\n\n" + line(BYE) + b"\n\n")
    assert [found.origin for found in read_values(path)] == ["train.jsonl:2", "train.jsonl:5"]


def test_a_unicode_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    # Catches str.splitlines(), which also splits at U+2028, U+0085 and form feeds.
    value = {"output": "one\u2028two\u0085three\u000bfour"}
    assert list(read_values(written(tmp_path, line(value)))) == [RawRecord(value, "train.jsonl:1")]


def test_a_line_of_three_megabytes_is_one_value(tmp_path):
    value = {"output": "长" * (3_000_000 // 3)}
    path = written(tmp_path, line(HELLO) + line(value) + line(BYE))
    assert [found.value for found in read_values(path)] == [HELLO, value, BYE]


# --- what is refused, line by line ----------------------------------------------------------------------------------


def test_a_broken_line_is_named_and_the_lines_around_it_are_read(tmp_path):
    path = written(tmp_path, line(HELLO) + b'{"instruction": "x", "output": \n' + line(BYE))
    first, broken, last = read_values(path)
    assert (first.value, last.value) == (HELLO, BYE)
    assert broken.origin == "train.jsonl:2"
    assert "not JSON" in broken.reason and "column" in broken.reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": }', "column 7: a value is expected here"),
        ("{a: 1}", "column 2: a key in double quotes is expected here"),
        ('{"a" 1}', "column 6: a colon is expected here"),
        ('{"a": 1 "b": 2}', "column 9: a comma or a closing bracket is expected here"),
        ('{"a": "x', "column 7: the text that begins here has no closing quote"),
        ('{"a": "x\ty"}', "column 9: a control character in a text"),
        ('{"a": "\\x"}', "column 8: a backslash that escapes nothing"),
        ("{“a”: 1}", "column 2: a typographic quote"),
        ('{"a"：1}', "column 5: a full-width mark"),
        ("{'a': 1}", "column 2: it is written as Python prints it"),
        ("{ 'a': 1}", "column 3: it is written as Python prints it"),
        ("{\"a\": [{'b': 1}]}", "column 9: it is written as Python prints it"),
        ('{"a":', "column 6: a value is expected here"),
    ],
)
def test_json_errors_are_explained_in_our_own_words(tmp_path, text, reason):
    (refusal,) = read_values(written(tmp_path, text.encode()))
    assert refusal.reason.startswith(f"not JSON at {reason}")
    assert re.search("[\u4e00-\u9fff]", catalogue("zh").translated(refusal.reason).partition("：")[2])


def test_a_gbk_line_is_refused_with_the_command_that_converts_it(tmp_path):
    # Catches errors="ignore" or "replace", which would silently train on damaged text.
    path = written(tmp_path, line(BYE) + json.dumps(HELLO, ensure_ascii=False).encode("gbk") + b"\n")
    (refusal,) = refusals(path)
    assert refusal.origin == "train.jsonl:2"
    assert "iconv -f GB18030 -t UTF-8" in refusal.reason


def test_bytes_of_no_known_encoding_are_not_called_gbk(tmp_path):
    path = written(tmp_path, b'{"output": "caf\xe9"}\n')  # Latin-1: \xe9 and a quote are no GB18030 character
    (refusal,) = refusals(path)
    assert "UTF-8" in refusal.reason and "GB18030" not in refusal.reason


def test_a_pretty_printed_object_error_asks_for_one_record_per_line(tmp_path):
    # Catches one refusal per line: a thousand for a file that one command can repair.
    path = written(tmp_path, b"\n".join(json.dumps(value, indent=2).encode() for value in (HELLO, BYE)))
    with pytest.raises(
        BadData, match=r"train\.jsonl:1: an object over several lines; expected one record per line"
    ) as raised:
        list(read_values(path))
    assert f"jq -c '.' {path} > NEW.jsonl" in str(raised.value)


def test_records_in_a_list_under_a_key_are_reported_with_that_key(tmp_path):
    whole = {"version": "1.0", "tags": ["a"], "data": [HELLO, BYE]}
    path = written(tmp_path, json.dumps(whole, indent=1).encode(), "my records.json")
    with pytest.raises(BadData, match=r'in the list under "data"') as raised:
        list(read_values(path))
    assert f"""jq -c '.["data"][]' '{path}' > NEW.jsonl""" in str(raised.value)


def test_an_unexpanded_glob_is_distinguished_from_a_missing_file(tmp_path):
    with pytest.raises(BadData, match="Patterns are expanded by the shell"):
        list(read_values(tmp_path / "*.jsonl"))


@pytest.mark.parametrize("content", [b'{"output": ' + b"[" * 200_000, b'{"output": ' + b"9" * 5000 + b"}"])
def test_json_beyond_pythons_limits_is_refused_without_a_crash(tmp_path, content):
    # Nesting beyond the recursion limit, and an integer beyond Python's limit of 4,300 digits.
    path = written(tmp_path, line(HELLO) + content + b"\n" + line(BYE))
    assert [one.origin for one in read_values(path)] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    (refusal,) = refusals(path)
    assert refusal.origin == "train.jsonl:2"
    assert "recursion" not in refusal.reason
    if b"[" in content:
        assert "nested too deeply" in refusal.reason


# --- arrays ---------------------------------------------------------------------------------------------------------


def test_an_array_gives_the_line_each_record_begins_on(tmp_path):
    text = "\n[\n" + json.dumps(HELLO, indent=1) + ",\n\n" + json.dumps(BYE) + "\n]\n"
    path = written(tmp_path, text.encode(), "train.json")
    lines_of_hello = json.dumps(HELLO, indent=1).count("\n") + 1
    assert list(read_values(path)) == [
        RawRecord(HELLO, "train.json:3"),
        RawRecord(BYE, f"train.json:{3 + lines_of_hello + 1}"),
    ]


def test_an_array_is_detected_by_its_first_character_not_by_file_name(tmp_path):
    path = written(tmp_path, json.dumps([HELLO, BYE]).encode(), "train.jsonl")
    assert [found.value for found in read_values(path)] == [HELLO, BYE]


def test_a_syntax_error_in_an_array_is_reported_with_its_line(tmp_path):
    path = written(tmp_path, b"[\n" + line(HELLO).rstrip() + b",\n" + b'{"instruction": "x", }\n]', "train.json")
    with pytest.raises(BadData, match=r"train\.json:3"):
        list(read_values(path))


def test_an_unterminated_json_array_is_refused_with_its_line(tmp_path):
    # After an interrupted download, the first records must not be trained as if they were the whole file.
    path = written(tmp_path, b"[\n" + line(HELLO).rstrip() + b",\n" + line(BYE), "train.json")
    with pytest.raises(BadData, match=r"train\.json:4"):
        list(read_values(path))


def test_text_after_the_end_of_an_array_is_refused(tmp_path):
    path = written(tmp_path, b"[" + line(HELLO).rstrip() + b"]\n" + line(BYE), "train.json")
    with pytest.raises(BadData, match=r"train\.json:1.*after the end"):
        list(read_values(path))


def test_an_array_nested_too_deeply_names_the_line(tmp_path):
    path = written(tmp_path, b"[\n" + b"[" * 200_000, "train.json")
    with pytest.raises(BadData, match=r"train\.json:2"):
        list(read_values(path))


def test_the_error_for_a_gbk_array_names_the_line_and_the_iconv_command(tmp_path):
    text = "[\n" + json.dumps(BYE) + ",\n" + json.dumps(HELLO, ensure_ascii=False) + "]"
    with pytest.raises(BadData, match=r"train\.json:3  .*iconv -f GB18030"):
        list(read_values(written(tmp_path, text.encode("gbk"), "train.json")))


# --- files that are no data -----------------------------------------------------------------------------------------


def test_a_missing_file_is_named_with_its_flag(tmp_path):
    with pytest.raises(BadData, match=r"nowhere\.jsonl: no such file.*--dataset_path"):
        list(read_values(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize("content", [b"", b" \n\r\n\t", codecs.BOM_UTF8, codecs.BOM_UTF8 + b"\n"])
def test_an_empty_file_is_called_empty(tmp_path, content):
    with pytest.raises(BadData, match=r"empty.*instruction, input, output"):
        list(read_values(written(tmp_path, content)))


@pytest.mark.parametrize("name", ["data", "a/data.jsonl", "/deep/a/data.jsonl"])
def test_a_single_source_is_named_by_its_file_name(name):
    assert distinct_names([name]) == [name.rpartition("/")[2]]
    assert distinct_names([name, name]) == [name.rpartition("/")[2]] * 2, "the same file twice is one file"


def test_files_with_the_same_name_get_the_shortest_distinct_paths():
    sources = ["x/a/train.jsonl", "x/b/train.jsonl", "y/b/train.jsonl", "other.jsonl", "train.jsonl"]
    names = distinct_names(sources)
    assert names == ["a/train.jsonl", "x/b/train.jsonl", "y/b/train.jsonl", "other.jsonl", "train.jsonl"]
    assert len(set(names)) == len(names)


def test_a_data_set_on_the_hub_is_named_in_full():
    # Origins begin with this name, so a shorter one would not be found in them.
    assert distinct_names(["owner/name", "owner/name:zh", "a/train.jsonl"]) == [
        "owner/name",
        "owner/name:zh",
        "train.jsonl",
    ]


# --- progress -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(line(HELLO) + b"\r\n" + b"{broken\n" + line(BYE).rstrip(), id="lines"),
        pytest.param(codecs.BOM_UTF8 + line(HELLO) + line(BYE), id="lines with a BOM"),
        pytest.param(b"\n[ " + line(HELLO) + b" ,\n" + line(BYE) + b" ]\n\n", id="array"),
        pytest.param(codecs.BOM_UTF8 + b"[" + line(HELLO) + b"]", id="array with a BOM"),
    ],
)
def test_progress_adds_up_to_the_size_of_the_file(tmp_path, content):
    # Otherwise the bar stops before 100%, or passes it if characters are counted instead of bytes.
    path, seen = written(tmp_path, content), []
    list(read_values(path, seen.append))
    assert sum(seen) == path.stat().st_size
    assert min(seen) >= 0


@pytest.mark.parametrize("content", ['{"a": 1, "a": 2}\n', '[{"a": 1}, {"b": 1, "b": 2}]'])
def test_a_duplicate_json_key_is_refused(tmp_path, content):
    path = tmp_path / "train.jsonl"
    path.write_text(content, encoding="utf-8")
    try:
        (refusal,) = list(read_values(path))
        said = refusal.reason
    except BadData as error:
        said = str(error)
    assert "appears twice" in said


def test_a_long_duplicate_key_is_not_repeated_in_full(tmp_path):
    key = "secret " * 1000
    (refusal,) = read_values(written(tmp_path, f'{{"{key}": 1, "{key}": 2}}'.encode()))
    assert "appears twice" in refusal.reason and len(refusal.reason) < 200


@pytest.mark.parametrize("value", [[[[1]]], [1, {"a": [2]}, [[]]], {"a": {"b": {}}}])
def test_levels_of_nesting_are_counted(value):
    assert is_deeper(value, 2) and not is_deeper(value, 3)
    assert not is_deeper("text", 1)


@pytest.mark.parametrize("content", ["[1 2]", "[1,,2]", "[1,]", "[,1]"])
def test_an_array_with_an_extra_or_missing_comma_is_refused_with_its_line(tmp_path, content):
    path = tmp_path / "train.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BadData, match=r"train\.json:1: the JSON array breaks here"):
        list(read_values(path))


# --- kinds ----------------------------------------------------------------------------------------------------------

RECORDS = [{"instruction": f'第{n}，\n"问"', "input": "", "output": f"{n}\t;"} for n in range(40)]


def as_table(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(RECORDS[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(RECORDS)


WRITE: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(b"".join(map(line, RECORDS))),
    "a.json": lambda path: path.write_text(json.dumps(RECORDS, indent=2)),
    "a.csv": as_table,
    "a.tsv": as_table,
    "a.txt": as_table,
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(b"".join(map(line, RECORDS)))),
    "a.parquet": lambda path: datasets.Dataset.from_list(RECORDS).to_parquet(path),
    "saved": lambda path: datasets.Dataset.from_list(RECORDS).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITE)
def test_every_file_format_yields_the_same_values_for_the_same_records(tmp_path, name):
    WRITE[name](tmp_path / name)
    found = list(read_values(tmp_path / name))
    assert [one.value for one in found] == RECORDS
    assert all(one.origin.startswith(f"{name}:") for one in found)
    assert list(read_values(str(tmp_path / name))) == found, "a path as text is the path"


@pytest.mark.parametrize("name", WRITE)
def test_parsed_chunks_equal_the_values_read_directly(tmp_path, name):
    WRITE[name](tmp_path / name)
    chunks = list(read_chunks(tmp_path / name))
    assert [one for chunk in chunks for one in parse_chunk(chunk)] == list(read_values(tmp_path / name))
    assert isinstance(chunks[0], Lines) == ("jsonl" in name), "the parsing of JSON lines is left to the worker"


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.parquet"])
def test_json_lines_with_another_extension_are_detected_by_the_first_byte(tmp_path, name):
    assert list(read_values(written(tmp_path, line(HELLO), name))) == [RawRecord(HELLO, f"{name}:1")]


def test_a_first_line_that_declares_the_separator_is_not_taken_for_the_header(tmp_path):
    table = written(tmp_path, "sep=|\ninstruction|output\n在吗|在的\n".encode(), "a.txt")
    assert list(read_values(table)) == [RawRecord({"instruction": "在吗", "output": "在的"}, "a.txt:3")]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_text_with_the_name_of_a_binary_table_is_reported_as_such(tmp_path, name):
    with pytest.raises(BadData, match=rf"{name}: it does not start like a \.\w+ file"):
        list(read_values(written(tmp_path, b"instruction,output\nx,y\n", name)))


@pytest.mark.parametrize("text", ["[" + "1,\n" * 2499 + "1]", "output\n" + "1\n" * 2500])
def test_values_are_sent_to_workers_in_batches(tmp_path, text):
    # All at once would take memory in proportion to the file.
    assert list(map(len, read_chunks(written(tmp_path, text.encode(), "a.csv")))) == [1000, 1000, 500]


@pytest.mark.parametrize("text", ["Chapter 1\n\nIt rained, and rained.\n", "用户\t客服\n在吗\t在的\n"])
def test_plain_text_is_refused_once_with_what_to_do(tmp_path, text):
    # Each line was refused as not JSON.
    with pytest.raises(BadData, match=r'a\.txt: plain text; .*\.csv or \.tsv\. .*"text"'):
        list(read_values(written(tmp_path, text.encode(), "a.txt")))


@pytest.mark.parametrize(("separator", "ending"), [(",", "csv"), ("\t", "tsv"), (";", "csv")])
def test_a_table_with_a_json_extension_is_refused_with_the_right_extension(tmp_path, separator, ending):
    # Once renamed as the message says, the file is read.
    path = written(tmp_path, f"instruction{separator}output\nx{separator}y\n".encode())
    with pytest.raises(BadData, match=rf"train\.jsonl:1: a table.*\n  mv \S+/train.jsonl \S+/train\.{ending}"):
        list(read_values(path))
    renamed = path.rename(path.with_suffix(f".{ending}"))
    assert list(read_values(renamed)) == [RawRecord({"instruction": "x", "output": "y"}, f"train.{ending}:2")]


@pytest.mark.parametrize("content", [b"a text, with a comma\n", b"output\n", b"{broken, output\n", b"'output', 1\n"])
def test_a_first_line_that_is_not_a_header_is_not_taken_for_a_table(tmp_path, content):
    assert "not JSON" in refusals(written(tmp_path, content))[0].reason


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PK\x03\x04", "zip"),
        (b"BZh9", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "xls"),
        (b"SQLite format 3\0", "SQLite"),
        (b"\x04\x22\x4d\x18\x64", "lz4"),
        (b"%PDF-1.7\n", "PDF"),
        (pickle.dumps([HELLO]), "pickle"),
        (gzip.compress(gzip.compress(line(HELLO))), "gzip"),  # compressed twice
        (gzip.compress(archive(line(HELLO))), "tar"),  # train.tar.gz
    ],
    # gzip content includes the time, so automatic ids would differ between pytest's worker processes.
    ids=["zip", "bzip2", "xz", "7z", "xls", "SQLite", "lz4", "PDF", "pickle", "gzip", "tar"],
)
def test_the_error_for_an_unsupported_archive_names_its_format(tmp_path, content, kind):
    behind = b"" if kind in ("gzip", "tar") else bytes(range(200))
    with pytest.raises(BadData, match=rf"a {kind}.* file; expected text. Unpack it"):
        list(read_values(written(tmp_path, content + behind)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
            "a git-lfs pointer.*\nFetch the files",
        ),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><title>Sign in</title>", "a web page"),
        (b"<HTML>404", "a web page"),
    ],
)
@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.csv"])
def test_a_git_lfs_pointer_or_web_page_instead_of_data_is_reported(tmp_path, content, words, name):
    with pytest.raises(BadData, match=words):
        list(read_values(written(tmp_path, content, name)))


def test_the_fingerprint_of_a_file_is_the_hash_of_its_bytes(tmp_path):
    path = written(tmp_path, line(HELLO))
    assert fingerprint_of(path) == fingerprint_of(str(path)) == hashlib.sha256(line(HELLO)).hexdigest()
    assert size_of(path) == size_of(str(path)) == len(line(HELLO))


def test_another_size_or_time_of_a_file_changes_the_stamp_of_its_source(tmp_path):
    path = written(tmp_path, line(HELLO))
    stamps = []
    for content, time in ((HELLO, 1), (HELLO, 2), (BYE, 2)):
        path.write_bytes(line(content))
        os.utime(path, ns=(time, time))
        stamps.append(stamp_of(path))
        assert stamp_of(tmp_path)[0] == stamps[-1][0]
    assert stamps[0] != stamps[1] != stamps[2] != stamps[0]
    path.unlink()
    assert stamp_of(path) == []


def test_a_named_pipe_is_refused_without_blocking(tmp_path):
    # A pipe would be read twice, and would block.
    os.mkfifo(tmp_path / "pipe.jsonl")
    for ask in (fingerprint_of, lambda source: list(read_values(source))):
        with pytest.raises(BadData, match="not a file"):
            ask(tmp_path / "pipe.jsonl")


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
@pytest.mark.parametrize("text", ["[" * 900 + "]" * 900, '{"x": ' * 900 + "1" + "}" * 900], ids=["lists", "objects"])
def test_a_value_nested_too_deeply_to_send_to_a_worker_process_is_refused(tmp_path, name, text):
    # Python parses 900 levels but can send only 400 to another process, so no record may have that many.
    deep, flat = {**HELLO, "x": json.loads(text)}, {**HELLO, "x": [[]] * 900}
    path = written(tmp_path, line(deep) if name.endswith("l") else json.dumps([deep]).encode(), name)
    try:
        reasons = [refusal.reason for refusal in refusals(path)]
    except BadData as error:
        reasons = [str(error)]
    assert len(reasons) == 1 and "nested too deeply" in reasons[0]
    assert [raw.value for raw in read_values(written(tmp_path, line(flat)))] == [flat]


@pytest.mark.parametrize(
    ("place", "holds"), [("data", True), ("data/out", True), ("data/.out", False), ("datafile", False), ("", False)]
)
def test_would_hold_detects_output_paths_inside_the_dataset_folder(tmp_path, place, holds):
    (tmp_path / "data").mkdir()
    assert would_hold(tmp_path / "data", tmp_path / place) is holds
    assert would_hold("owner/name", tmp_path / place) is False
