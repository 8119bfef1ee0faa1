"""Example cache: finished examples kept as Arrow files, found again by what they were made of.

The key is a hash of the file's bytes, the tokenizer, the template and the settings: a changed file, or any other
change that could change one token, has another key, so an old entry is never served for it.
An entry is a folder of two files and their checksums; one that does not match them is made again, which is said.
A row is a record, with all the Examples it became: they are drawn together, so that what they share is computed once.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray

from atomtune.choices import FormatChoice, Learn, Overlength
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.choose_template import runs_programs
from atomtune.data.encoding.encode import Encoder, entered_in_ledger
from atomtune.data.formats.detect import Schema, detect_schema, to_record
from atomtune.data.ledger import Ledger
from atomtune.data.reading.jsonl import parse_chunk
from atomtune.data.reading.raw import Chunk, RawRecord
from atomtune.data.reading.sources import DataFile, distinct_names, fingerprint_of, read_files, size_of, stamp_of
from atomtune.data.records import Example, Record, Refusal
from atomtune.data.workers import in_order, workers_here
from atomtune.disk import sha256_of, sync, text_of
from atomtune.errors import BadData, BadSettings
from atomtune.limits import try_apart

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
#: How many values of a file its format is told from.
_SAMPLE_VALUES = 100
#: The files of an entry, and their checksums.
EXAMPLES, LEDGER, CHECKSUMS = "examples.arrow", "ledger.json", "checksums.json"
#: What a rename says where something stands under the new name that it must not, or cannot, take away.
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EACCES}
#: To take a name that other processes want at the same moment.
_ATTEMPTS = 10
#: A smaller source, in bytes, is encoded by one process: a stranger's template or tokenizer in another one than this.
_WORTH_A_POOL = 4 * 2**20
#: What a record may take that is examined, beside a second for so many characters; slow tokenizers do thrice as many.
_RECORD_SECONDS, _CHARACTERS_A_SECOND = 10, 50_000


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
    notes: tuple[str, ...] = ()  # what happened to the cache that a user should know


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
    arguments: dict[str, str] = {}
    if backend is not None:
        body = backend.to_str()
    else:
        body = json.dumps(sorted(tokenizer.get_vocab().items()))
        # A tokenizer written in Python has rules outside its vocabulary; its arguments choose among them.
        for name, value in sorted(tokenizer.init_kwargs.items()):
            arguments[name] = str(value)
    return json.dumps([type(tokenizer).__name__, body, str(tokenizer.special_tokens_map), arguments])


def examples_of(
    source: Path | str,
    template: Template,
    rules: Rules,
    *,
    name: str | None = None,
    advance: Callable[[int], None] = lambda n_bytes: None,
    cache_dir: Path | None = None,
) -> EncodedData:
    """All examples of a file, folder or hub data set.

    name  how origins name the source, where not by its file's name

    Served from the cache when nothing changed. advance is called with bytes read.
    Raises BadData for a file that cannot be read, or changes while it is, or whose format cannot be told.
    """
    if name is None:
        name = distinct_names([source])[0]
    stamp = stamp_of(source)
    data_hash = fingerprint_of(source)
    folder = cache_dir or Path(datasets.config.HF_DATASETS_CACHE)
    place = folder / "atomtune" / _key(name, data_hash, template, rules)
    notes: tuple[str, ...] = ()
    problems = {entry: entry_problem(entry) for entry in (place, _own(place))}
    entry = next((entry for entry, problem in problems.items() if not problem), None)
    if entry is None:
        if place.exists():
            notes = (f"the cached examples of {name} are built again: {problems[place]}.",)
        ledger = Ledger()
        parts = encoded(source, template, rules, ledger, name=name, advance=advance)
        entry = _write_entry(place, name, ledger, _refusing_change(parts, source, stamp))
    else:
        advance(size_of(source))
    ledger = Ledger.from_json(json.loads((entry / LEDGER).read_text(encoding="utf-8")))
    if ledger.records_used == 0:
        empty = datasets.Dataset.from_dict({column: [] for column in FEATURES}, features=FEATURES)
        return EncodedData(empty, ledger, data_hash, notes)
    return EncodedData(datasets.Dataset.from_file(str(entry / EXAMPLES)), ledger, data_hash, notes)


def _refusing_change(parts: Iterable[Part], source: Path | str, stamp: object) -> Iterator[Part]:
    """The parts. Raises BadData behind them where the source changed since its stamp was taken.

    What was read would be stored under the hash of other bytes, and served for these one day.
    """
    yield from parts
    if stamp_of(source) != stamp:
        raise _changed(source)


def _changed(source: Path | str) -> BadData:
    return BadData(
        f"{source} changed while it was being read. Run the command again once nothing writes to it any more."
    )


def _key(name: str, data_hash: str, template: Template, rules: Rules) -> str:
    """A hash of all that could change a token, or the origin of one."""
    made_of = [
        _code_hash(),
        datasets.__version__,
        data_hash,
        name,
        *template.made_of(),
        str(rules),
        tokenizer_text(template.tokenizer),
    ]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]


def _own(place: Path) -> Path:
    """This user's entry, where the one that all users share is another's, not whole, and not ours to replace."""
    return place.with_name(f"{place.name}-{os.getuid() if hasattr(os, 'getuid') else 0}")


def entry_problem(entry: Path) -> str:
    """Why an entry of the cache is not served; "" where it is whole.

    Every byte is compared with its checksum: a flipped bit in an id would be trained on without a word.
    """
    try:
        checksums = json.loads(text_of(entry / CHECKSUMS))
        if not isinstance(checksums, dict) or checksums.keys() != {EXAMPLES, LEDGER}:
            return f"{CHECKSUMS} was written by another version"
        for file_name, checksum in checksums.items():
            if _checksum(entry / file_name) != checksum:
                return f"{file_name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return f"it cannot be read ({type(error).__name__})"
    return ""


def _checksum(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return sha256_of(path)


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
    hashes = "".join(part.data_hash for part in parts)
    data_hash = hashlib.sha256(hashes.encode()).hexdigest()
    notes = itertools.chain.from_iterable(part.notes for part in parts)
    return EncodedData(examples, ledger, data_hash, tuple(notes))


def encoded(
    source: Path | str,
    template: Template,
    rules: Rules,
    ledger: Ledger,
    *,
    name: str | None = None,
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> Iterator[Part]:
    """A source's records as finished rows, part by part, each entered into ledger."""

    def encode(work: tuple[Schema, Chunk]) -> Part:
        schema, chunk = work
        encoder = Encoder(template, schema, rules.max_tokens, rules.overlength, rules.learn)
        batch = encoder(parse_chunk(chunk))
        return Part(as_table(batch.records), batch.ledger, batch.instructions)

    def examine(work: tuple[Schema, Chunk]) -> None:
        """Encode the records of a chunk one by one within limits. Raises BadData at one that trips them."""
        schema, chunk = work

        def each_record(say: Callable[[str], None]) -> None:
            for raw in parse_chunk(chunk):
                say(raw.origin)
                # Thousands of answers to one history are thousands of prompts: each has the seconds for itself.
                at_answer = partial(say, raw.origin)
                Encoder(template, schema, rules.max_tokens, rules.overlength, rules.learn, at_answer=at_answer)([raw])

        seconds = _RECORD_SECONDS + len(str(chunk)) // _CHARACTERS_A_SECOND
        if tripped := try_apart(each_record, seconds=seconds, each_place=True):
            raise BadData(
                f"{tripped.at}: encoding this record {tripped.words}.\nThe chat template, or a pattern in the model's "
                "tokenizer.json, does not finish on its text. Remove the record, or use the template and the tokenizer "
                "that were published with the model."
            )

    workers = workers_here()
    if size_of(source) <= _WORTH_A_POOL:
        workers = min(workers, int(runs_programs(template)))
    chunks = chunks_with_schema(source, rules, name=name, advance=advance)
    yield from entered_in_ledger(in_order(encode, chunks, workers=workers, examine=examine), ledger)


def chunks_with_schema(
    source: Path | str,
    rules: Rules,
    *,
    name: str | None = None,
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> Iterator[tuple[Schema, Chunk]]:
    """Every chunk of the source, with how the values of its file are read: each file of a folder has its own format.

    Raises BadData where a file cannot be read, or its format cannot be told.
    """
    for file in read_files(source, advance, name=name):
        first = list(itertools.islice(file.chunks, 1))
        schema = _schema_of(file, first, rules)
        for chunk in itertools.chain(first, file.chunks):
            yield schema, chunk


def _schema_of(file: DataFile, first: Sequence[Chunk], rules: Rules) -> Schema:
    """How a file's values are read, told from the first of them; what the user says stands before a description."""
    sample: list[RawRecord] = []
    for chunk in first:
        sample += [raw for raw in parse_chunk(chunk) if isinstance(raw, RawRecord)]
    sample = sample[:_SAMPLE_VALUES]
    format_choice: FormatChoice = rules.format
    if format_choice == "auto" and file.format:
        format_choice = file.format
    return detect_schema(
        [raw.value for raw in sample],
        format_choice=format_choice,
        keys={**file.keys, **dict(rules.keys)},
        roles={**file.roles, **dict(rules.roles)},
        name=file.name,
        first=sample[0].origin if sample else "",
    )


def records_of(
    source: Path | str,
    rules: Rules,
    stored: datasets.Dataset,
    advance: Callable[[int], None] = lambda n_bytes: None,
    *,
    name: str | None = None,
) -> Iterator[Record]:
    """The records that became the rows of stored, in their order: for what only their texts can tell.

    Raises BadData at the end where one is not there any more: whoever counts on their order would be wrong about rows.
    """
    batches = stored.with_format("arrow").iter(1000)
    origins = (origin for batch in batches for origin in batch["origin"].to_pylist())
    next_origin = next(origins, None)
    for schema, chunk in chunks_with_schema(source, rules, name=name, advance=advance):
        if next_origin is None:
            return
        for raw in parse_chunk(chunk):
            if raw.origin != next_origin or isinstance(raw, Refusal):
                continue
            record = to_record(raw, schema).outcome
            if isinstance(record, Record):
                yield record
                next_origin = next(origins, None)
    if next_origin is not None:
        raise _changed(source)


def _write_entry(entry: Path, name: str, ledger: Ledger, parts: Iterable[Part]) -> Path:
    """Fill a folder beside the entry's place, bring it to the disk and rename it: no half of an entry is ever found.

    Returns where it lies.
    """
    _prepare(entry.parent)
    _sweep(entry.parent)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".new-") as scratch:
        folder = Path(scratch) / entry.name
        folder.mkdir()  # with the rights that the user's umask gives; a temporary folder is for its owner alone
        writer = ArrowWriter(path=str(folder / EXAMPLES), features=FEATURES)
        for part in parts:
            writer.write_table(part.table)
        if ledger.records_read == 0:
            raise BadData(
                f"{name}: it holds no records. Expected one JSON object per line: instruction, input, output."
            )
        writer.finalize()
        writer.close()
        if ledger.records_used:
            ledger.records_copied = copies_in(datasets.Dataset.from_file(str(folder / EXAMPLES)))
        (folder / LEDGER).write_text(json.dumps(ledger.to_json(), ensure_ascii=False), encoding="utf-8")
        checksums = {file_name: _checksum(folder / file_name) for file_name in (EXAMPLES, LEDGER)}
        (folder / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
        for path in (folder / EXAMPLES, folder / LEDGER, folder / CHECKSUMS, folder):
            sync(path)
        return _put(folder, entry, Path(scratch))


def _put(folder: Path, place: Path, scratch: Path) -> Path:
    """Give the finished folder the entry's name, or this user's own where another user's stands there and is not whole.

    Returns the name it got.
    """
    for entry in (place, _own(place)):
        if _takes(folder, entry, scratch):
            sync(entry.parent)
            return entry
    why = "its examples are incomplete, belong to another user and cannot be replaced"
    raise BadSettings([f"{place}: {why}. Set HF_DATASETS_CACHE to another folder."])


def _takes(folder: Path, entry: Path, scratch: Path) -> bool:
    """Whether the finished folder takes this name, or an equal one has it; what is not whole there is moved aside."""
    for attempt in range(_ATTEMPTS):
        try:
            folder.rename(entry)
            return True
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        if not entry_problem(entry):
            return True  # another process finished the same entry; its content is equal
        try:
            # Moved aside, not emptied: a process that reads the old files goes on reading them.
            entry.rename(scratch / f"not-whole-{attempt}")
        except FileNotFoundError:  # another process moved it just now
            continue
        except PermissionError:
            return False
    return False


def _sweep(cache: Path) -> None:
    """Remove what killed processes left; a living one's folder is younger than a day."""
    for left in cache.glob(".new-*"):
        with contextlib.suppress(OSError):  # its process is alive and just done, or another user's
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left, ignore_errors=True)


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
    if not len(examples):
        return 0
    digests = examples.with_format("numpy")["digest"][:]
    return len(digests) - len(numpy.unique(digests))


def as_table(records: Sequence[tuple[Example, ...]]) -> pyarrow.Table:
    """The Examples of some records as rows of the cache, a row a record."""
    examples = [example for record in records for example in record]
    # array and bytes take Python's integers over three times as fast as numpy does.
    ids = array("i", itertools.chain.from_iterable(example.ids for example in examples))
    marks = b"".join([bytes(example.learn) for example in examples])
    tokens = numpy.frombuffer(ids, dtype=numpy.int32)  # [T], T tokens of all records, R of them
    learn = numpy.frombuffer(marks, dtype=numpy.int8)  # [T]
    ends = [list(itertools.accumulate(len(example.ids) for example in record)) for record in records]
    lengths = [record_ends[-1] for record_ends in ends]
    bounds = numpy.cumsum([0, *lengths], dtype=numpy.int32)  # [R + 1]
    arrays = [
        pyarrow.ListArray.from_arrays(bounds, tokens),
        pyarrow.ListArray.from_arrays(bounds, learn),
        pyarrow.array(ends, pyarrow.list_(pyarrow.int32())),
        pyarrow.array([record[0].origin for record in records], pyarrow.string()),
        pyarrow.array(lengths, pyarrow.int32()),
        pyarrow.array(_digests(tokens, learn, bounds, ends), pyarrow.int64()),
    ]
    return pyarrow.Table.from_arrays(arrays, schema=FEATURES.arrow_schema)


def _digests(
    tokens: NDArray[numpy.int32],
    learn: NDArray[numpy.int8],
    bounds: NDArray[numpy.int32],
    ends: Sequence[Sequence[int]],
) -> list[int]:
    """Of each row, eight bytes that are equal for equal ids, marks and ends.

    tokens  [T]      ids of all rows, one behind the other
    learn   [T]      their learn marks
    bounds  [R + 1]  where each row begins
    ends    [R]      of each row, where its Examples end
    """
    digests = []
    for (start, end), row_ends in zip(itertools.pairwise(bounds.tolist()), ends, strict=True):
        content = hashlib.blake2b(tokens[start:end].tobytes(), digest_size=8)
        content.update(learn[start:end].tobytes() + bytes(str(row_ends), "ascii"))
        digests.append(int.from_bytes(content.digest(), "big", signed=True))
    return digests


def as_examples(row: Mapping[str, Any]) -> tuple[Example, ...]:
    """The Examples of a row of the cache, as the frozen values it was made from."""
    # ids   1 5 6 7 1 5 8      the Examples of a record, one behind the other
    # ends        4     7      one past the last token of each
    ids, learn, origin = row["ids"], row["learn"], row["origin"]
    examples = []
    for start, end in itertools.pairwise([0, *row["ends"]]):
        examples.append(Example(tuple(ids[start:end]), tuple(learn[start:end]), origin))
    return tuple(examples)
