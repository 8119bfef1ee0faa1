"""Mutated files: no traceback, and used + refused = read, whatever the bytes. `make fuzz` uses ten thousand files."""

import codecs
import json
import os
import random
from pathlib import Path

import pytest

from atomtune.data.cache import examples_of
from atomtune.data.encoded_source import Rules
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.formats.detect import to_record
from atomtune.data.records import Refusal
from atomtune.errors import UserError
from tests.reading import read_values
from tests.tiny import tokenizer_of

FILES = int(os.environ.get("ATOMTUNE_FUZZ", "300"))
ROUND = 50

SEEDS = [
    "".join(
        json.dumps(record, ensure_ascii=ascii) + "\n"
        for record in [
            {"instruction": "你是谁？", "input": "", "output": "我是小原子🙂"},
            {"instruction": "Who are you?", "output": "I am 42.\n", "history": [["a", "b"], ["c", "d"]]},
            {"system": "short", "instruction": "x</s>y", "input": "z", "output": "<s>"},
        ]
    ).encode()
    for ascii in (False, True)
]
SEEDS.append(b"[" + b",\n".join(SEEDS[0].splitlines()) + b"]")
TOKENS = [
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r\n", b"\0", b"\\u0000", b"\\ud83d", b"\xef\xbb\xbf"),
    *(
        b"null",
        b"NaN",
        b"1e999",
        b"true",
        b"\xff\xfe",
        b"\xc4\xe3",
        b"\xe2\x80\xa8",
        b'"output"',
        b"9" * 5000,
        b"[" * 2000,
    ),
]


def mutated(draw: random.Random) -> bytes:
    content = bytearray(draw.choice(SEEDS))
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(content) + 1)
        kind = draw.randrange(6)
        if kind == 0:
            content[at:at] = draw.choice(TOKENS)
        elif kind == 1:
            del content[at : at + draw.randint(1, 40)]
        elif kind == 2 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 3:
            part = bytes(content[at : at + draw.randint(1, 60)])
            content[at:at] = part * draw.randint(1, 3)
        elif kind == 4:
            content = content[:at] + bytearray(draw.randbytes(draw.randint(1, 20))) + content[at:]
        else:
            other = draw.choice(SEEDS)
            content = content[:at] + bytearray(other[draw.randrange(len(other)) :])
    if draw.random() < 0.05:
        return bytes(content).decode("utf-8", "replace").encode(draw.choice(["utf-16", "utf-32", "gb18030"]), "replace")
    return bytes(content)


MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def lines_with_content(content: bytes) -> int:
    for encoding, marks in MARKS.items():
        if content.startswith(marks):
            content = content.decode(encoding, "replace").encode("utf-8", "replace")
            break
    return sum(bool(part.strip()) for part in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))


@pytest.mark.parametrize("seed", range(FILES // ROUND))
def test_mutated_jsonl_never_crashes_the_reader_or_loses_a_record(tmp_path: Path, seed: int):
    draw = random.Random(seed)
    template = load_template("atom", tokenizer_of("sentencepiece"))
    for number in range(ROUND):
        content = mutated(draw)
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(content)
        try:
            found = list(read_values(path))
        except UserError as error:
            assert path.name in str(error)
            continue
        if not content.lstrip().removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            assert len(found) == lines_with_content(content), "every line is a value or a refusal"
        kinds = [one if isinstance(one, Refusal) else to_record(one).outcome for one in found]
        refused = [one for one in kinds if isinstance(one, Refusal)]
        json.dumps([[one.origin, one.reason] for one in refused]).encode()
        try:
            ledger = examples_of(path, template, Rules(max_tokens=64), cache_dir=tmp_path / "store").ledger
        except UserError as error:  # no record of the file has the keys of a format
            assert path.name in str(error) and any(word in str(error) for word in ("fits", "preference"))
            continue
        assert ledger.records_read == len(found)
        assert ledger.records_used + len(ledger.records_refused) == ledger.records_read
