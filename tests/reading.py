"""A source read whole in one process, as the workers of a run read it in parts."""

from collections.abc import Iterator
from pathlib import Path

from atomtune.data.reading.jsonl import parse_chunk
from atomtune.data.reading.raw import Chunk, RawRecord
from atomtune.data.reading.sources import Advance, read_files
from atomtune.data.records import Refusal


def read_values(source: Path | str, advance: Advance = lambda n_bytes: None) -> Iterator[RawRecord | Refusal]:
    """Every value of the source, or the reason why a line or row is none."""
    for chunk in read_chunks(source, advance):
        yield from parse_chunk(chunk)


def read_chunks(source: Path | str, advance: Advance = lambda n_bytes: None) -> Iterator[Chunk]:
    for file in read_files(source, advance):
        yield from file.chunks
