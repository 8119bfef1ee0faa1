"""Laws of UTF-16 and UTF-32: files from a spreadsheet or Notepad are read as if they were UTF-8."""

import json
from pathlib import Path

import pytest

from atomtune.data.reading.transcoding import encoding_of
from atomtune.errors import BadData
from tests.reading import read_values

RECORDS = [{"instruction": "说早", "output": "早上好😀"}, {"instruction": "say\nit", "output": "now"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\r\n" for record in RECORDS)
TABLE = 'instruction\tinput\toutput\r\n说早\t\t早上好\r\n"say\nit"\t\tnow\r\n'  # Excel's "Unicode text"
#: With a byte-order mark, and without one if every second byte of plain ASCII is zero.
ENCODINGS = ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-8", "utf-8-sig"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_utf_16_and_utf_32_files_are_read_like_utf_8(tmp_path: Path, encoding):
    # Windows' Notepad calls UTF-16 "Unicode". Users who followed the advice to convert were once refused.
    for name, text in (("a.jsonl", LINES), ("a.json", json.dumps(RECORDS, indent=1)), ("a.csv", TABLE)):
        plain, other = tmp_path / "plain" / name, tmp_path / name
        plain.parent.mkdir(exist_ok=True)
        plain.write_bytes(text.encode("utf-8"))
        other.write_bytes(text.encode(encoding))
        assert list(read_values(other)) == list(read_values(plain)), name
        bytes_seen: list[int] = []
        list(read_values(other, bytes_seen.append))
        assert sum(bytes_seen) == other.stat().st_size


def test_a_character_split_between_two_read_chunks_is_decoded(tmp_path: Path):
    text = json.dumps({"instruction": "x", "output": "😀" * 100_000}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(text.encode("utf-16"))
    (found,) = read_values(tmp_path / "a.jsonl")
    assert found.value["output"] == "😀" * 100_000


@pytest.mark.parametrize("damage", [b"x", b"\x00\xd8x\x00"])
def test_bytes_invalid_in_the_detected_encoding_are_reported_with_their_line(tmp_path: Path, damage):
    (tmp_path / "a.jsonl").write_bytes(LINES.encode("utf-16") + damage)
    with pytest.raises(BadData, match=r"a\.jsonl:3: not UTF-16"):
        list(read_values(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("head", [b"", b"{", b"[1]", b"\0\0\0\0", "早上好".encode(), b"a\0"])
def test_files_that_do_not_look_like_utf_16_or_32_are_taken_for_utf_8(head):
    assert encoding_of(head) == "utf-8"
