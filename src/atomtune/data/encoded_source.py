"""Encoded source: the records of a file, folder or hub data set as finished rows, encoded in worker processes."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import pyarrow

from atomtune.choices import FormatChoice, Learn, Overlength
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.encode import Encoder
from atomtune.data.encoding.template_probes import runs_programs
from atomtune.data.example_table import as_table
from atomtune.data.formats.detect import detect_schema, to_record
from atomtune.data.formats.schema import Schema
from atomtune.data.ledger import Ledger
from atomtune.data.reading.jsonl import parse_chunk
from atomtune.data.reading.raw import Chunk, RawRecord
from atomtune.data.reading.sources import DataFile, read_files, size_of
from atomtune.data.records import Record, Refusal
from atomtune.data.workers import in_order, workers_here
from atomtune.errors import BadData
from atomtune.limits import try_in_child_process

#: The format of a file is detected from this many of its first values.
_SAMPLE_VALUES = 100
#: Bytes. A smaller source is encoded in this process, or in one worker if the template or tokenizer is untrusted.
_WORTH_A_POOL = 4 * 2**20
#: Time limit per record of an examined chunk: 10 s, plus 1 s per 50,000 characters of the chunk; slow tokenizers manage
#: three times as many.
_RECORD_SECONDS = 10
_CHARACTERS_A_SECOND = 50_000
#: A data set has a shared instruction if at least this share of its records has it.
_SHARED_SHARE = 0.9
#: Bounds the memory for counting instructions; beyond it, rare ones are forgotten.
_INSTRUCTIONS_KEPT = 10_000


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
class EncodedPart:
    """A batch of rows as a worker returns it."""

    table: pyarrow.Table
    ledger: Ledger
    instructions: Counter[str]


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

    def encoder(schema: Schema) -> Encoder:
        return Encoder(template, schema, rules.max_tokens, rules.overlength, rules.learn)

    def encode(work: tuple[Schema, Chunk]) -> EncodedPart:
        schema, chunk = work
        batch = encoder(schema)(parse_chunk(chunk))
        return EncodedPart(as_table(batch.records), batch.ledger, batch.instructions)

    def examine(work: tuple[Schema, Chunk]) -> None:
        schema, chunk = work
        _refuse_endless(encoder(schema), chunk)

    workers = workers_here()
    if size_of(source) <= _WORTH_A_POOL:
        workers = min(workers, int(runs_programs(template)))
    chunks = chunks_with_schema(source, rules, name=name, advance=advance)
    yield from entered_in_ledger(in_order(encode, chunks, workers=workers, examine=examine), ledger)


def _refuse_endless(encoder: Encoder, chunk: Chunk) -> None:
    """Encode the records of a chunk one by one under limits. Raises BadData at the one that exceeds them."""

    def each_record(say: Callable[[str], None]) -> None:
        for raw in parse_chunk(chunk):
            say(raw.origin)
            # A conversation may have thousands of answers and as many prompts: the limit applies to each answer.
            replace(encoder, at_answer=partial(say, raw.origin))([raw])

    seconds = _RECORD_SECONDS + len(str(chunk)) // _CHARACTERS_A_SECOND
    if tripped := try_in_child_process(each_record, seconds=seconds, each_place=True):
        raise BadData(
            f"{tripped.at}: encoding this record {tripped.words}.\nThe chat template, or a pattern in the model's "
            "tokenizer.json, does not finish on its text. Remove the record, or use the template and the tokenizer "
            "that were published with the model."
        )


def entered_in_ledger(parts: Iterable[EncodedPart], ledger: Ledger) -> Iterator[EncodedPart]:
    """Pass the parts on and add their counts to `ledger`; at the end, set its `shared_instruction` if there is one."""
    instructions: Counter[str] = Counter()  # in a large file, some rare ones are forgotten
    for part in parts:
        ledger.add(part.ledger)
        instructions.update(part.instructions)
        if len(instructions) > _INSTRUCTIONS_KEPT:
            instructions = Counter(dict(instructions.most_common(_INSTRUCTIONS_KEPT // 10)))
        yield part
    for text, count in instructions.most_common(1):
        if count >= max(2, _SHARED_SHARE * ledger.records_read):
            ledger.shared_instruction = text


def chunks_with_schema(
    source: Path | str,
    rules: Rules,
    *,
    name: str | None,
    advance: Callable[[int], None],
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
        raise changed_while_read(source)


def changed_while_read(source: Path | str) -> BadData:
    return BadData(
        f"{source} changed while it was being read. Run the command again once nothing writes to it any more."
    )
