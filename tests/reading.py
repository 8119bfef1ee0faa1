"""Read and encode records in one process; the workers of a run do it in parts."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from atomtune.choices import Learn, Overlength
from atomtune.data.encoded_source import entered_in_ledger
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.encode import Encoder
from atomtune.data.formats.schema import Schema
from atomtune.data.ledger import Ledger
from atomtune.data.reading.jsonl import parse_chunk
from atomtune.data.reading.raw import Chunk, RawRecord
from atomtune.data.reading.sources import Advance, read_files
from atomtune.data.records import Example, Refusal


def read_values(source: Path | str, advance: Advance = lambda n_bytes: None) -> Iterator[RawRecord | Refusal]:
    """Every value of the source, or a refusal for a line or row that has none."""
    for chunk in read_chunks(source, advance):
        yield from parse_chunk(chunk)


def read_chunks(source: Path | str, advance: Advance = lambda n_bytes: None) -> Iterator[Chunk]:
    for file in read_files(source, advance):
        yield from file.chunks


def encode(
    raw_records: Iterable[RawRecord | Refusal],
    template: Template,
    ledger: Ledger,
    *,
    max_tokens: int,
    schema: Schema | None = None,
    overlength: Overlength = "shorten",
    learn: Learn = "all",
) -> list[tuple[Example, ...]]:
    """The Examples of each record that is used; everything else is counted in `ledger`."""
    encoder = Encoder(template, schema or Schema(), max_tokens, overlength, learn)
    (batch,) = entered_in_ledger([encoder(list(raw_records))], ledger)
    return batch.records
