"""Read a whole source in one process; the workers of a run read it in parts."""

from collections.abc import Iterator
from pathlib import Path

from atomtune.data.reading.jsonl import parse_chunk
from atomtune.data.reading.raw import Chunk, RawRecord
from atomtune.data.reading.sources import Advance, read_files
from atomtune.data.records import Refusal


def read_values(source: Path | str, advance: Advance = lambda n_bytes: None) -> Iterator[RawRecord | Refusal]:
    """Every value of the source, or a refusal for a line or row that has none."""
    for chunk in read_chunks(source, advance):
        yield from parse_chunk(chunk)


def read_chunks(source: Path | str, advance: Advance = lambda n_bytes: None) -> Iterator[Chunk]:
    for file in read_files(source, advance):
        yield from file.chunks
