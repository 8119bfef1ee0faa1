"""Example cache: encoded examples stored as Arrow files under a hash of everything they depend on.

Any change that could change a token changes the hash (cache_key.py), so a stale entry is never used.
An entry is a folder of two files and their checksums. One that does not match its checksums is built again, with a
note to the user.
A row is a record with all its Examples. They are drawn together, so that their shared prefix is computed once.
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
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray

from atomtune.choices import FormatChoice, Learn, Overlength
from atomtune.data.cache_key import cache_key
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.encode import Encoder, entered_in_ledger
from atomtune.data.encoding.template_probes import runs_programs
from atomtune.data.formats.detect import Schema, detect_schema, to_record
from atomtune.data.ledger import Ledger
from atomtune.data.reading.jsonl import parse_chunk
from atomtune.data.reading.raw import Chunk, RawRecord
from atomtune.data.reading.sources import (
    DataFile,
    distinct_names,
    fingerprint_of,
    joint_fingerprint,
    note_on_splits,
    read_files,
    size_of,
    stamp_of,
)
from atomtune.data.records import Example, Record, Refusal
from atomtune.data.workers import in_order, workers_here
from atomtune.disk import sha256_of, sync, text_of
from atomtune.errors import BadData, BadSettings
from atomtune.folders import scratch_folder
from atomtune.limits import try_in_child_process

FEATURES = datasets.Features(
    {
        "ids": datasets.List(datasets.Value("int32")),  # of all the record's Examples, concatenated
        "learn": datasets.List(datasets.Value("int8")),
        "ends": datasets.List(datasets.Value("int32")),  # end of each Example in ids, exclusive
        "origin": datasets.Value("string"),
        "length": datasets.Value("int32"),  # len(ids); read by the Trainer's group_by_length sampling
        "digest": datasets.Value("int64"),  # hash of ids, learn and ends, to count copies
    }
)
#: The format of a file is detected from this many of its first values.
_SAMPLE_VALUES = 100
#: The files of an entry.
EXAMPLES, LEDGER, CHECKSUMS = "examples.arrow", "ledger.json", "checksums.json"
#: Errors of a rename whose target exists and cannot be replaced.
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EACCES}
#: Attempts to take a name that other processes may take at the same moment.
_ATTEMPTS = 10
#: Bytes. A smaller source is encoded in this process, or in one worker if the template or tokenizer is untrusted.
_WORTH_A_POOL = 4 * 2**20
#: Time limit per record of an examined chunk: 10 s, plus 1 s per 50,000 characters of the chunk; slow tokenizers manage
#: three times as many.
_RECORD_SECONDS, _CHARACTERS_A_SECOND = 10, 50_000


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The settings that decide, besides the template, which examples a file becomes. All are part of the cache key."""

    max_tokens: int
    overlength: Overlength = "shorten"
    learn: Learn = "all"
    format: FormatChoice = "auto"
    keys: tuple[tuple[str, str], ...] = ()  # (the file's key, ours)
    roles: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class EncodedData:
    """The encoded examples of one file or several."""

    examples: datasets.Dataset  # the columns of FEATURES, one row per record
    ledger: Ledger
    data_hash: str  # of the source's bytes
    notes: tuple[str, ...] = ()  # about the source and the cache, for the user


@dataclass(frozen=True)
class EncodedPart:
    """A batch of rows as a worker returns it."""

    table: pyarrow.Table
    ledger: Ledger
    instructions: Counter[str]


def examples_of(
    source: Path | str,
    template: Template,
    rules: Rules,
    *,
    name: str | None = None,
    advance: Callable[[int], None] = lambda n_bytes: None,
    cache_dir: Path | None = None,
) -> EncodedData:
    """All examples of a file, folder or hub data set, from the cache if nothing changed.

    name       the name of the source in origins; default: its file name
    advance    called with the number of bytes read since the last call
    cache_dir  default: the cache folder of `datasets`
    Raises BadData if the source cannot be read, changes while it is read, holds no records, or if its format cannot be
    detected; BadSettings if the cache folder is not writable.
    """
    if name is None:
        name = distinct_names([source])[0]
    stamp = stamp_of(source)
    data_hash = fingerprint_of(source)
    folder = cache_dir or Path(datasets.config.HF_DATASETS_CACHE)
    place = folder / "atomtune" / cache_key(name, data_hash, template, str(rules))
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
    if note := note_on_splits(source, name):
        notes = (*notes, note)
    ledger = Ledger.from_json(json.loads((entry / LEDGER).read_text(encoding="utf-8")))
    if ledger.records_used == 0:
        empty = datasets.Dataset.from_dict({column: [] for column in FEATURES}, features=FEATURES)
        return EncodedData(empty, ledger, data_hash, notes)
    return EncodedData(datasets.Dataset.from_file(str(entry / EXAMPLES)), ledger, data_hash, notes)


def _refusing_change(parts: Iterable[EncodedPart], source: Path | str, stamp: object) -> Iterator[EncodedPart]:
    """Yield the parts, then raise BadData if the source changed since its stamp was taken.

    Otherwise the examples would be stored under the hash of other bytes, and later be used for those.
    """
    yield from parts
    if stamp_of(source) != stamp:
        raise _changed(source)


def _changed(source: Path | str) -> BadData:
    return BadData(
        f"{source} changed while it was being read. Run the command again once nothing writes to it any more."
    )


def _own(place: Path) -> Path:
    """The path of this user's own entry, for a broken shared entry that belongs to another user."""
    return place.with_name(f"{place.name}-{os.getuid() if hasattr(os, 'getuid') else 0}")


def entry_problem(entry: Path) -> str:
    """Why a cache entry cannot be used; "" if it is intact.

    Every file is read in full and its checksum compared: a flipped bit in a token id would go unnoticed otherwise.
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
    """Join the examples of several files: rows and ledgers in order, and one hash over all their hashes."""
    if len(parts) == 1:
        return parts[0]
    examples = datasets.concatenate_datasets([part.examples for part in parts])
    ledger = Ledger()
    for part in parts:
        ledger.add(part.ledger)
    shared_instructions = {part.ledger.shared_instruction for part in parts}
    ledger.shared_instruction = shared_instructions.pop() if len(shared_instructions) == 1 else None
    ledger.records_copied = copies_in(examples)
    data_hash = joint_fingerprint([part.data_hash for part in parts])
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
) -> Iterator[EncodedPart]:
    """Encode a source: yield its records as finished rows, part by part, and add each part's counts to `ledger`.

    Raises BadData with the record's origin if encoding it takes too long or too much memory.
    """

    def encode(work: tuple[Schema, Chunk]) -> EncodedPart:
        schema, chunk = work
        encoder = Encoder(template, schema, rules.max_tokens, rules.overlength, rules.learn)
        batch = encoder(parse_chunk(chunk))
        return EncodedPart(as_table(batch.records), batch.ledger, batch.instructions)

    def examine(work: tuple[Schema, Chunk]) -> None:
        """Encode the records of a chunk one by one under limits. Raises BadData at the one that exceeds them."""
        schema, chunk = work

        def each_record(say: Callable[[str], None]) -> None:
            for raw in parse_chunk(chunk):
                say(raw.origin)
                # A conversation may have thousands of answers and as many prompts: the limit applies to each answer.
                at_answer = partial(say, raw.origin)
                Encoder(template, schema, rules.max_tokens, rules.overlength, rules.learn, at_answer=at_answer)([raw])

        seconds = _RECORD_SECONDS + len(str(chunk)) // _CHARACTERS_A_SECOND
        if tripped := try_in_child_process(each_record, seconds=seconds, each_place=True):
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
    """Every chunk of the source with the schema of its file: each file of a folder may have its own format.

    Raises BadData if a file cannot be read or its format cannot be detected.
    """
    for file in read_files(source, advance, name=name):
        chunks, sample = _up_to_a_value(file.chunks)
        schema = _schema_of(file, sample, rules)
        for chunk in itertools.chain(chunks, file.chunks):
            yield schema, chunk


def _up_to_a_value(chunks: Iterator[Chunk]) -> tuple[list[Chunk], list[RawRecord]]:
    """The chunks up to the first one with a value, and that one's first values; others hold only unreadable lines.

    Unreadable lines are kept as Refusals, which are small.
    """
    unreadable: list[Chunk] = []
    for chunk in chunks:
        parsed = parse_chunk(chunk)
        values = [raw for raw in parsed if isinstance(raw, RawRecord)]
        if values:
            return [*unreadable, chunk], values[:_SAMPLE_VALUES]
        unreadable.append(parsed)
    return unreadable, []


def _schema_of(file: DataFile, sample: Sequence[RawRecord], rules: Rules) -> Schema:
    """Detect a file's schema from its first values; the user's settings override the file's dataset_info.json."""
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
    """Read again the records that the rows of `stored` were encoded from, in the same order, for their texts.

    Raises BadData at the end if one of them is missing: records and rows would not match.
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


def _write_entry(entry: Path, name: str, ledger: Ledger, parts: Iterable[EncodedPart]) -> Path:
    """Write the entry to a temporary folder next to its place, sync it and rename it, so it is never seen half-written.

    Returns the entry's path. Raises BadData if there are no records.
    """
    _prepare(entry.parent)
    _sweep(entry.parent)
    with scratch_folder(".new-", within=entry.parent) as scratch:
        folder = scratch / entry.name
        folder.mkdir()  # permissions from the umask, for a shared cache; the temporary folder itself is private
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
        return _put(folder, entry, scratch)


def _put(folder: Path, place: Path, scratch: Path) -> Path:
    """Rename the finished folder to the shared entry, or to this user's own if a broken one of another user is there.

    Returns the entry's path. Raises BadSettings if neither name can be used.
    """
    for entry in (place, _own(place)):
        if _takes(folder, entry, scratch):
            sync(entry.parent)
            return entry
    why = "its examples are incomplete, belong to another user and cannot be replaced"
    raise BadSettings([f"{place}: {why}. Set HF_DATASETS_CACHE to another folder."])


def _takes(folder: Path, entry: Path, scratch: Path) -> bool:
    """Try to rename the finished folder to `entry`; a broken entry there is moved aside.

    True if `entry` is intact afterwards, which may also be another process's equal entry.
    """
    for attempt in range(_ATTEMPTS):
        try:
            folder.rename(entry)
            return True
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        if not entry_problem(entry):
            return True  # another process wrote the same entry first; its content is equal
        try:
            # Moved aside, not emptied: another process may still be reading the old files.
            entry.rename(scratch / f"not-whole-{attempt}")
        except FileNotFoundError:  # another process has just moved it
            continue
        except PermissionError:
            return False
    return False


def _sweep(cache: Path) -> None:
    """Remove temporary folders of killed processes: those older than a day."""
    for left in cache.glob(".new-*"):
        with contextlib.suppress(OSError):  # removed in the meantime, or another user's
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
    """The number of rows that are equal to an earlier row. Memory: 8 bytes per row."""
    if not len(examples):
        return 0
    digests = examples.with_format("numpy")["digest"][:]
    return len(digests) - len(numpy.unique(digests))


def as_table(records: Sequence[tuple[Example, ...]]) -> pyarrow.Table:
    """The Examples of R records as R rows of the cache."""
    examples = [example for record in records for example in record]
    # array and bytes convert Python integers more than three times as fast as numpy.
    ids = array("i", itertools.chain.from_iterable(example.ids for example in examples))
    marks = b"".join([bytes(example.learn) for example in examples])
    tokens = numpy.frombuffer(ids, dtype=numpy.int32)  # [T], T tokens in all records together
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
    """A 64-bit hash for each row, of its ids, learn marks and ends.

    tokens  [T]      ids of all rows, concatenated
    learn   [T]      their learn marks
    bounds  [R + 1]  row r is tokens[bounds[r]:bounds[r + 1]]
    ends    [R]      for each row, the end of each Example within the row
    Returns [R] signed integers.
    """
    digests = []
    for (start, end), row_ends in zip(itertools.pairwise(bounds.tolist()), ends, strict=True):
        content = hashlib.blake2b(tokens[start:end].tobytes(), digest_size=8)
        content.update(learn[start:end].tobytes() + bytes(str(row_ends), "ascii"))
        digests.append(int.from_bytes(content.digest(), "big", signed=True))
    return digests


def as_examples(row: Mapping[str, Any]) -> tuple[Example, ...]:
    """The Examples of a row of the cache."""
    # ids   1 5 6 7 1 5 8      the record's Examples, concatenated
    # ends        4     7      end of each, exclusive
    ids, learn, origin = row["ids"], row["learn"], row["origin"]
    examples = []
    for start, end in itertools.pairwise([0, *row["ends"]]):
        examples.append(Example(tuple(ids[start:end]), tuple(learn[start:end]), origin))
    return tuple(examples)
