"""Mutated files of every kind except plain JSON give values, refusals or one clear error, and never crash."""

import csv
import gzip
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import Refusal
from atomtune.errors import BadData
from tests.reading import read_values

FILES = int(os.environ.get("ATOMTUNE_FUZZ", "300"))
ROWS = [
    {"instruction": f'第{n}，\n"问"', "messages": [{"role": "user", "content": "x" * n}], "n": n} for n in range(50)
]
TABLE = pyarrow.Table.from_pylist(ROWS)
LINES = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)


def parquet() -> bytes:
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(TABLE, out, row_group_size=20)
    return out.getvalue().to_pybytes()


def arrow(new: Callable[..., pyarrow.ipc.RecordBatchStreamWriter]) -> bytes:
    out = pyarrow.BufferOutputStream()
    with new(out, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=20)
    return out.getvalue().to_pybytes()


def table() -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows([["instruction", "output"], *([row["instruction"], "x,y"] for row in ROWS)])
    return out.getvalue().encode()


WHOLE = {
    "a.csv": table(),
    "a.parquet": parquet(),
    "file.arrow": arrow(pyarrow.ipc.new_file),
    "stream.arrow": arrow(pyarrow.ipc.new_stream),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": pyarrow.compress(LINES, codec="zstd", asbytes=True),
    "a.csv.gz": gzip.compress(table()),
}


def mutated(content: bytes, draw: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(len(made)), draw.randrange(4)
        if kind == 0:
            made[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del made[at : at + draw.randint(1, 60)]
        elif kind == 2:
            made[at:at] = draw.randbytes(draw.randint(1, 20))
        else:
            made[at : at + 8] = draw.choice([b"\xff", b"\0", b"\x7f"]) * 8
    return bytes(made)


@pytest.mark.parametrize("name", WHOLE)
def test_mutated_files_of_any_kind_never_crash_the_reader(tmp_path: Path, name):
    # It found a schema with a column name that is not UTF-8, and a length that asks for more than all memory.
    draw = random.Random(name)
    path = tmp_path / name
    for _ in range(FILES // len(WHOLE)):
        path.write_bytes(mutated(WHOLE[name], draw))
        try:
            for one in read_values(path):
                assert isinstance(one, RawRecord | Refusal)
                assert one.origin.startswith(f"{name}:")
        except BadData as error:
            assert name in str(error)


def test_parquet_metadata_that_would_end_the_process_are_refused_by_name(tmp_path: Path):
    # Found by the 670th of ten thousand alterations: an exception in pyarrow that nothing can catch ended the process.
    draw, path = random.Random("a.parquet"), tmp_path / "a.parquet"
    for _ in range(670):
        content = mutated(WHOLE["a.parquet"], draw)
    path.write_bytes(content)
    with pytest.raises(BadData, match=r"a\.parquet"):
        list(read_values(path))
