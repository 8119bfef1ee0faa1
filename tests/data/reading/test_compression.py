"""Laws of compressed files: the content is read as it was, in bounded memory, and half a file never passes as whole."""

import csv
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from atomtune.data.reading import compression
from atomtune.data.reading.compression import ending_of, open_bytes, open_raw
from atomtune.data.reading.sources import size_of
from atomtune.data.records import Refusal
from atomtune.errors import BadData
from tests.reading import read_values

RECORDS = [{"instruction": f'第{n}个，"问"', "input": "", "output": f"答\n{n * 7919}"} for n in range(3000)]


def as_jsonl() -> bytes:
    return b"".join(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in RECORDS)


def as_csv(separator: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(RECORDS[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(RECORDS)
    return out.getvalue().encode()


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstd}
TEXTS = {
    "jsonl": as_jsonl(),
    "json": json.dumps(RECORDS, indent=1).encode(),
    "csv": as_csv(","),
    "tsv": as_csv("\t"),
}


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("kind", TEXTS)
def test_a_compressed_file_gives_the_same_records_as_the_plain_file(tmp_path: Path, kind, ending):
    plain, packed, seen = tmp_path / f"a.{kind}", tmp_path / f"a.{kind}.{ending}", []
    plain.write_bytes(TEXTS[kind])
    packed.write_bytes(PACK[ending](TEXTS[kind]))
    expected = [(one.value, one.origin.replace(f"a.{kind}:", f"a.{kind}.{ending}:")) for one in read_values(plain)]
    assert list(read_values(packed, seen.append)) == expected
    assert [value for value, _ in expected] == RECORDS
    assert sum(seen) == size_of(packed) == packed.stat().st_size < plain.stat().st_size


@pytest.mark.parametrize("ending", PACK)
def test_concatenated_compressed_files_are_read_to_the_end(tmp_path: Path, ending):
    # `cat a.gz b.gz` and parallel packers write such files; a reader that stops at the first end loses the rest.
    pack, lines = PACK[ending], as_jsonl().splitlines(keepends=True)
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(b"".join(pack(b"".join(lines[n : n + 1000])) for n in (0, 1000, 2000)))
    assert [one.value for one in read_values(path)] == RECORDS


def test_a_zstd_file_that_begins_with_a_skippable_frame_is_read(tmp_path: Path):
    # pzstd writes one before each frame. Each line was refused as not UTF-8.
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes((skippable + zstd(as_jsonl())) * 2)
    assert [one.value for one in read_values(path)] == RECORDS * 2


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_a_truncated_compressed_file_is_refused_with_its_line(tmp_path: Path, ending, share):
    # At 1.0 only the last byte is missing, in gzip's checksum or zstd's last block.
    whole = PACK[ending](as_jsonl())
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(whole[: max(5, min(len(whole) - 1, int(len(whole) * share)))])
    with pytest.raises(BadData, match=rf"a\.jsonl\.{ending}:\d+: the \w+ file ends in the middle") as told:
        list(read_values(path))
    line = int(str(told.value).split(":")[1])
    assert len(RECORDS) * share - 1500 < line <= len(RECORDS) + 1, "to 64 KiB, which are some 1,000 of these lines"


@pytest.mark.parametrize("share", [0, 0.5], ids=["not a block", "another checksum"])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, share):
    whole = bytearray(gzip.compress(as_jsonl()))
    whole[10 + int(len(whole) * share)] ^= 6  # after ten bytes of header; these bits are the kind of the first block
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole)
    with pytest.raises(BadData, match=r"a\.jsonl\.gz:\d+: the gzip file is damaged.*gzip -t"):
        list(read_values(path))


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.csv.gz", "A.Csv.ZST"])
def test_the_extension_is_that_of_the_content_in_lower_case(name):
    assert ending_of(Path(name)) == ".csv"


def test_compression_is_detected_by_content_not_by_file_name(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(as_jsonl()))
    assert len(list(read_values(path))) == len(RECORDS)
    (tmp_path / "b.jsonl.gz").write_bytes(as_jsonl())
    assert len(list(read_values(tmp_path / "b.jsonl.gz"))) == len(RECORDS)


@pytest.mark.parametrize(("kind", "magic"), [("Parquet", b"PAR1"), ("Arrow", b"ARROW1")])
def test_a_binary_table_inside_gzip_is_refused_with_the_remedy(tmp_path: Path, kind, magic):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(magic + bytes(100)))
    with pytest.raises(BadData, match=rf"{kind} file.*Unpack it"):
        list(read_values(path))


def test_a_file_that_has_disappeared_is_reported(tmp_path: Path):
    with pytest.raises(BadData, match=r"gone\.jsonl: cannot be read: No such file"):
        open_raw(tmp_path / "gone.jsonl")


def test_an_empty_compressed_file_is_reported_as_empty(tmp_path: Path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(BadData, match="the file is empty"):
        list(read_values(path))


def test_content_is_unpacked_a_buffer_at_a_time(tmp_path: Path):
    # Catches gzip.decompress(path.read_bytes()).
    path, seen = tmp_path / "a.jsonl.gz", []
    path.write_bytes(gzip.compress(as_jsonl(), compresslevel=0) * 20)
    with open_bytes(path, seen.append, name="a.jsonl.gz") as stream:
        stream.read(1)
        assert sum(seen) < path.stat().st_size / 4


@pytest.mark.parametrize("ending", PACK)
def test_a_decompression_bomb_is_refused_in_bounded_memory(tmp_path: Path, ending):
    # One line of 240 MiB in a file of half a megabyte. The process may use 100 MiB more than for a short file.
    path = tmp_path / f"bomb.jsonl.{ending}"
    if ending == "gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(b'{"output": "')
            for _ in range(240):
                file.write(bytes(1 << 20))
    else:
        with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(path), "wb"), "zstd") as file:
            file.write(b'{"output": "')
            for _ in range(240):
                file.write(bytes(1 << 20))
    code = """if True:
        import resource, sys
        from pathlib import Path
        from atomtune.data.reading.jsonl import parse_chunk
        from atomtune.data.reading.sources import read_files
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        chunks = (chunk for file in read_files(Path(sys.argv[1])) for chunk in file.chunks)
        (only,) = (one for chunk in chunks for one in parse_chunk(chunk))
        print(only.reason)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    reason, mebibytes = done.stdout.splitlines()
    assert "a record may have at most 4 MB" in reason
    assert int(mebibytes) < 100


def test_a_refusal_in_a_packed_file_has_its_line(tmp_path: Path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": \n'))
    assert [one.origin for one in read_values(path) if isinstance(one, Refusal)] == ["a.jsonl.gz:3"]


@pytest.mark.parametrize("pack", [gzip.compress, lambda raw: pyarrow.compress(raw, "zstd", asbytes=True)])
def test_an_excessive_decompression_ratio_is_refused(tmp_path: Path, monkeypatch, pack):
    # A thousand times the file's size in blank lines: kilobytes that take hours to read.
    monkeypatch.setattr(compression, "FREE_BYTES", 2**20)
    (tmp_path / "a.jsonl.gz").write_bytes(pack(b'{"text": "x"}\n' + b"\n" * (8 << 20)))
    with pytest.raises(BadData, match="more than 200 times its size"):
        list(read_values(tmp_path / "a.jsonl.gz"))


def test_a_file_that_unpacks_to_more_than_the_free_bytes_is_read(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(compression, "FREE_BYTES", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(as_jsonl()))
    assert len(list(read_values(tmp_path / "a.jsonl.gz"))) == len(RECORDS)


def test_highly_compressible_data_is_read(tmp_path: Path):
    record = b'{"instruction": "the same persona in front of every question", "output": "yes"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(record * 20_000))
    assert len(list(read_values(tmp_path / "a.jsonl.gz"))) == 20_000
