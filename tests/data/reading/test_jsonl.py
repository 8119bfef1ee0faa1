"""Laws of chunks: wherever a file is cut, the values and their line numbers are the same."""

import io
import json
import pickle
import subprocess
import sys

import pytest

from atomtune.data.reading import jsonl, raw
from atomtune.data.reading.jsonl import parse_chunk, read_chunks
from atomtune.data.reading.raw import Lines, RawRecord
from atomtune.data.records import Refusal
from tests.steps import Counted

VALUES = [{"output": "长" * n + "\u2028x" * (n % 3)} for n in (0, 1, 40, 3, 200, 7, 0, 90)]
CONTENT = b"".join(
    b"\n" * (n % 3) + json.dumps(value, ensure_ascii=False).encode() + b"\r\n" for n, value in enumerate(VALUES)
)


def read(content: bytes) -> list[RawRecord | Refusal]:
    return [one for chunk in read_chunks(io.BytesIO(content), "a.jsonl") for one in parse_chunk(chunk)]


def by_lines(content: bytes) -> list[tuple[object, str]]:
    lines = content.decode().split("\n")
    return [(json.loads(line), f"a.jsonl:{n}") for n, line in enumerate(lines, 1) if line.strip()]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 50, 300, 10_000])
def test_the_chunk_size_changes_neither_values_nor_line_numbers(monkeypatch, chunk_bytes):
    # Catches lines cut in two, lines counted twice at a cut, and a cut that falls on a newline.
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", chunk_bytes)
    assert read(CONTENT) == by_lines(CONTENT)
    assert read(CONTENT.rstrip()) == by_lines(CONTENT.rstrip())


@pytest.mark.parametrize("chunk_bytes", [1, 5, 16, 64])
def test_an_oversized_line_is_refused_and_the_others_keep_their_numbers(monkeypatch, chunk_bytes):
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 64)
    found = read(b'{"a": 1}\n\n"' + b"x" * 300 + b'"\n{"a": 2}\n"' + b"y" * 62)
    assert [one.origin for one in found] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5"]
    assert [one.value for one in found if isinstance(one, RawRecord)] == [{"a": 1}, {"a": 2}]
    assert "a line of 303 bytes" in found[1].reason


@pytest.mark.parametrize("chunk_bytes", [1, 64, 500])
def test_a_line_of_just_the_size_limit_is_read_and_so_is_the_next(monkeypatch, chunk_bytes):
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 64)
    values = ["x" * 61, "next"]  # 64 bytes with quotes and line end
    content = b"".join(json.dumps(value).encode() + b"\n" for value in values)
    assert [one.value for one in read(content)] == values


@pytest.mark.parametrize("chunk_bytes", [1, 9, 500])
def test_a_byte_order_mark_in_the_middle_is_refused_wherever_the_file_is_cut(monkeypatch, chunk_bytes):
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", chunk_bytes)
    first, second = read(b'{"a": 1}\n\xef\xbb\xbf{"a": 2}\n')
    assert first.value == {"a": 1}
    assert isinstance(second, Refusal) and "a byte-order mark in the middle" in second.reason


def test_a_chunk_can_be_parsed_in_another_process():
    # As a pool does: pickled, and without the byte-order mark, which only the first chunk has.
    (chunk,) = read_chunks(io.BytesIO(b"\xef\xbb\xbf" + CONTENT), "a.jsonl")
    assert isinstance(chunk, Lines)
    assert parse_chunk(pickle.loads(pickle.dumps(chunk))) == by_lines(CONTENT)


def test_the_worker_module_imports_no_heavy_libraries():
    # A spawned worker that imports datasets needs a second before its first record.
    heavy = "{'torch', 'datasets', 'pyarrow', 'numpy'}"
    code = f"import sys, atomtune.data.reading.jsonl; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_wide_object_with_a_duplicate_key_is_refused_in_linear_time(monkeypatch):
    # Comparing each key with all others took the square of 100,000 steps.
    wide = "{" + ", ".join(f'"k{number}": 1' for number in range(100_000)) + ', "k99999": 2}'
    (refusal,) = read(wide.encode())
    assert isinstance(refusal, Refusal) and 'key "k99999" appears twice' in refusal.reason
    pairs = [(Counted(f"k{number}"), 1) for number in (*range(1_000), 999)]
    monkeypatch.setattr(Counted, "comparisons", 0)
    with pytest.raises(ValueError, match='key "k999" appears twice'):
        raw._object_without_repeats(pairs)
    assert Counted.comparisons < 10_000  # each with all others: 500,000


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "expected one record per line, or a JSON array of them"),
        (b'{"a": 1} {"a": 2}', "text after the end of the record"),
        (b'{"a": "x\0"}', "NUL bytes"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON value"),
    ],
)
def test_a_line_that_is_no_record_is_refused_with_its_cause(line, reason):
    (refusal,) = read(line + b"\n")
    assert isinstance(refusal, Refusal) and reason in refusal.reason


def test_a_comma_after_a_record_is_reported_as_such():
    (refusal, _) = read(b'{"output": "a"},\n{"output": "b"}\n')
    assert isinstance(refusal, Refusal) and "a comma after the record" in refusal.reason
