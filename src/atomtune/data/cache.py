"""The store: finished examples kept as Arrow files, found again by what they were made of.

The key is a hash of the file's bytes, the tokenizer, the template and the settings: a changed file, or any other
change that could change one token, has another key, so an old file is never served for it.
A row is a record, with all the Examples it became: they are drawn together, so that what they share is computed once.
"""

import errno
import hashlib
import itertools
import json
import shutil
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow
from datasets.arrow_writer import ArrowWriter

from atomtune.choices import FormatChoice, Learn, Overlength
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.encode import Encoder, entered_in_ledger
from atomtune.data.formats.detect import Schema, detect_schema, to_record
from atomtune.data.ledger import Ledger
from atomtune.data.reading.jsonl import parse_chunk
from atomtune.data.reading.raw import Chunk
from atomtune.data.reading.sources import RawRecord, fingerprint_of, read_chunks, size_of
from atomtune.data.records import Example, Record, Refusal
from atomtune.data.workers import in_order, workers_here
from atomtune.errors import BadData, BadSettings

FEATURES = datasets.Features(
    {
        "ids": datasets.List(datasets.Value("int32")),  # of all Examples, one behind the other
        "learn": datasets.List(datasets.Value("int8")),
        "ends": datasets.List(datasets.Value("int32")),  # one past the last token of each Example
        "origin": datasets.Value("string"),
        "length": datasets.Value("int32"),  # read by the Trainer's group_by_length sampling
        "digest": datasets.Value("int64"),  # equal for equal ids and marks
    }
)
#: How many values are looked at to tell a file's format.
_LOOKED_AT = 100
#: A smaller source, in bytes, is encoded in this process.
_WORTH_A_POOL = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What turns a file's values into examples, besides the template: plain values, each part of the key."""

    max_tokens: int
    overlength: Overlength = "shorten"
    learn: Learn = "all"
    format: FormatChoice = "auto"
    keys: tuple[tuple[str, str], ...] = ()  # (the file's key, ours)
    roles: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class EncodedData:
    """The finished examples of one file or several."""

    examples: datasets.Dataset  # columns as in FEATURES, a row a record
    ledger: Ledger
    data_hash: str  # of the bytes they were read from


@dataclass(frozen=True)
class Part:
    """A finished batch of rows, on its way from the process that made it."""

    table: pyarrow.Table
    ledger: Ledger
    instructions: Counter[str]


@cache
def _code_hash() -> str:
    """Of this room's own code and templates: examples made by other rules are not these."""
    files = sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".jinja"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def tokenizer_text(tokenizer: Any) -> str:
    """Everything about a tokenizer that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    # A tokenizer written in Python has rules outside its vocabulary; its arguments choose among them.
    arguments = {} if backend is not None else {k: str(v) for k, v in sorted(tokenizer.init_kwargs.items())}
    return json.dumps([type(tokenizer).__name__, body, str(tokenizer.special_tokens_map), arguments])


def examples_of(
    source: Path | str,
    template: Template,
    rules: Rules,
    *,
    advance: Callable[[int], None] = lambda n_bytes: None,
    cache_dir: Path | None = None,
) -> EncodedData:
    """All examples of a file, folder or hub data set.

    Served from the store when nothing changed. advance is called with bytes read.
    Raises BadData for a file that cannot be read, or whose format cannot be told.
    """
    data_hash = fingerprint_of(source)
    made_of = [
        _code_hash(),
        datasets.__version__,
        data_hash,
        Path(source).name,
        template.source,
        template.stop,
        template.instruction_role,
        str(rules),
        tokenizer_text(template.tokenizer),
    ]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    folder = (cache_dir or Path(datasets.config.HF_DATASETS_CACHE)) / "atomtune" / key
    if (folder / "ledger.json").is_file():
        advance(size_of(source))
    else:
        ledger = Ledger()
        _write(folder, Path(source).name, ledger, encoded(source, template, rules, ledger, advance=advance))
    ledger = Ledger.from_json(json.loads((folder / "ledger.json").read_text(encoding="utf-8")))
    if ledger.records_used == 0:
        empty = datasets.Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES)
        return EncodedData(empty, ledger, data_hash)
    return EncodedData(datasets.Dataset.from_file(str(folder / "examples.arrow")), ledger, data_hash)


def concatenate(parts: Sequence[EncodedData]) -> EncodedData:
    """The examples of several files one behind the other, one ledger, and one hash of all their bytes."""
    if len(parts) == 1:
        return parts[0]
    examples = datasets.concatenate_datasets([part.examples for part in parts])
    ledger = Ledger()
    for part in parts:
        ledger.add(part.ledger)
    shared_instructions = {part.ledger.shared_instruction for part in parts}
    ledger.shared_instruction = shared_instructions.pop() if len(shared_instructions) == 1 else None
    ledger.records_copied = copies_in(examples)
    data_hash = hashlib.sha256("".join(part.data_hash for part in parts).encode()).hexdigest()
    return EncodedData(examples, ledger, data_hash)


def encoded(
    source: Path | str,
    template: Template,
    rules: Rules,
    ledger: Ledger,
    *,
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> Iterator[Part]:
    """A source's records as finished rows, part by part, each entered into ledger."""
    schema, chunks = schema_of(source, rules, advance)
    encoder = Encoder(template, schema, rules.max_tokens, rules.overlength, rules.learn)

    def encode(chunk: Chunk) -> Part:
        made = encoder(parse_chunk(chunk))
        return Part(as_table(made.records), made.ledger, made.instructions)

    workers = workers_here() if size_of(source) > _WORTH_A_POOL else 1
    yield from entered_in_ledger(in_order(encode, chunks, workers=workers), ledger)


def schema_of(
    source: Path | str, rules: Rules, advance: Callable[[int], None] = lambda n_bytes: None
) -> tuple[Schema, Iterator[Chunk]]:
    """How the source's values are read, told from the first of them; and all of it, the looked-at ones included.

    Raises BadData where it cannot be read, or its format cannot be told.
    """
    chunks = read_chunks(source, advance)
    first = list(itertools.islice(chunks, 1))
    found = [one for chunk in first for one in parse_chunk(chunk)]
    seen = [one for one in found if isinstance(one, RawRecord)][:_LOOKED_AT]
    values, place = [one.value for one in seen], next((one.origin for one in seen), "")
    schema = detect_schema(
        values, asked=rules.format, keys=dict(rules.keys), roles=dict(rules.roles), name=Path(source).name, first=place
    )
    return schema, itertools.chain(first, chunks)


def records_of(
    source: Path | str, rules: Rules, stored: datasets.Dataset, advance: Callable[[int], None] = lambda n_bytes: None
) -> Iterator[Record]:
    """The records that became the rows of stored, in their order: for what only their texts can tell."""
    origins = (origin for part in stored.with_format("arrow").iter(1000) for origin in part["origin"].to_pylist())
    next_one = next(origins, None)
    schema, chunks = schema_of(source, rules, advance)
    for found in itertools.chain.from_iterable(map(parse_chunk, chunks)):
        if found.origin != next_one or isinstance(found, Refusal):
            continue
        record = to_record(found, schema).outcome
        if isinstance(record, Record):
            yield record
            next_one = next(origins, None)


def _write(folder: Path, name: str, ledger: Ledger, parts: Iterable[Part]) -> None:
    """Fill a folder beside the final one and rename it: a killed run leaves no half-made entry."""
    _prepare(folder.parent)
    for left in folder.parent.glob(".new-*"):  # of processes that were killed; a living one is younger than a day
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as made:
        writer = ArrowWriter(path=str(Path(made) / "examples.arrow"), features=FEATURES)
        for part in parts:
            writer.write_table(part.table)
        if ledger.records_read == 0:
            raise BadData(f"{name}: it holds no records. Expected one JSON object a line: instruction, input, output.")
        writer.finalize()
        writer.close()
        ledger.records_copied = (
            copies_in(datasets.Dataset.from_file(str(Path(made) / "examples.arrow"))) if ledger.records_used else 0
        )
        (Path(made) / "ledger.json").write_text(json.dumps(ledger.to_json(), ensure_ascii=False), encoding="utf-8")
        done = Path(made).rename(folder.with_suffix(f".{Path(made).name[5:]}"))
    try:
        done.rename(folder)
    except OSError:  # another process finished the same entry first; its content is equal
        for file in done.iterdir():
            file.unlink()
        done.rmdir()


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = f"finished examples cannot be stored here: {error.strerror}"
        raise BadSettings([f"{folder}: {why}. Set HF_DATASETS_CACHE to a folder that can be written."]) from None


def copies_in(examples: datasets.Dataset) -> int:
    """How many rows repeat an earlier one; eight bytes of memory a row."""
    digests = examples.with_format("numpy")["digest"][:]
    return len(digests) - len(numpy.unique(digests)) if len(digests) else 0


def as_table(records: Sequence[tuple[Example, ...]]) -> pyarrow.Table:
    """The Examples of some records as rows of the store."""
    examples = [example for one in records for example in one]
    # array and bytes take Python's integers over three times as fast as numpy does.
    ids = array("i", itertools.chain.from_iterable(example.ids for example in examples))
    learn = numpy.frombuffer(b"".join([bytes(example.learn) for example in examples]), dtype=numpy.int8)
    ends = [list(itertools.accumulate(len(example.ids) for example in one)) for one in records]
    lengths = [one[-1] for one in ends]
    bounds = numpy.cumsum([0, *lengths], dtype=numpy.int32)
    tokens = numpy.frombuffer(ids, dtype=numpy.int32)
    arrays = [
        pyarrow.ListArray.from_arrays(bounds, tokens),
        pyarrow.ListArray.from_arrays(bounds, learn),
        pyarrow.array(ends, pyarrow.list_(pyarrow.int32())),
        pyarrow.array([one[0].origin for one in records], pyarrow.string()),
        pyarrow.array(lengths, pyarrow.int32()),
        pyarrow.array(_digests(tokens, learn, bounds, ends), pyarrow.int64()),
    ]
    return pyarrow.Table.from_arrays(arrays, schema=FEATURES.arrow_schema)


def _digests(tokens: Any, learn: Any, bounds: Any, ends: Sequence[Sequence[int]]) -> list[int]:
    """Of each row, eight bytes that are equal for equal ids, marks and ends."""
    found = []
    for (start, end), own in zip(itertools.pairwise(bounds.tolist()), ends, strict=True):
        content = hashlib.blake2b(tokens[start:end].tobytes(), digest_size=8)
        content.update(learn[start:end].tobytes() + bytes(str(own), "ascii"))
        found.append(int.from_bytes(content.digest(), "big", signed=True))
    return found


def as_examples(row: Mapping[str, Any]) -> tuple[Example, ...]:
    """The Examples of a row of the store, as the frozen values it was made from."""
    bounds = itertools.pairwise([0, *row["ends"]])
    return tuple(Example(tuple(row["ids"][a:b]), tuple(row["learn"][a:b]), row["origin"]) for a, b in bounds)
