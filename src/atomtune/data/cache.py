"""Example cache: encoded examples stored as Arrow files under a hash of everything they depend on.

Any change that could change a token changes the hash (cache_key.py), so a stale entry is never used.
An entry that does not match its checksums is built again, with a note to the user.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from atomtune.data.cache_entry import EXAMPLES, LEDGER, entry_problem, own_entry, write_entry
from atomtune.data.cache_key import cache_key
from atomtune.data.encoded_source import EncodedPart, Rules, changed_while_read, encoded
from atomtune.data.encoding.chat_template import Template
from atomtune.data.example_table import copies_in
from atomtune.data.ledger import Ledger
from atomtune.data.reading.sources import (
    distinct_names,
    fingerprint_of,
    joint_fingerprint,
    notes_on,
    size_of,
    stamp_of,
)


@dataclass(frozen=True)
class EncodedData:
    """The encoded examples of one file or several."""

    examples: datasets.Dataset  # the columns of FEATURES, one row per record
    ledger: Ledger
    data_hash: str  # of the source's bytes
    notes: tuple[str, ...] = ()  # about the source and the cache, for the user


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
    problems = {entry: entry_problem(entry) for entry in (place, own_entry(place))}
    entry = next((entry for entry, problem in problems.items() if not problem), None)
    if entry is None:
        if place.exists():
            notes = (f"the cached examples of {name} are built again: {problems[place]}.",)
        ledger = Ledger()
        parts = encoded(source, template, rules, ledger, name=name, advance=advance)
        entry = write_entry(place, name, ledger, _refusing_change(parts, source, stamp))
    else:
        advance(size_of(source))
    notes = (*notes, *notes_on(source, name))
    ledger = Ledger.from_json(json.loads((entry / LEDGER).read_text(encoding="utf-8")))
    return EncodedData(datasets.Dataset.from_file(str(entry / EXAMPLES)), ledger, data_hash, notes)


def _refusing_change(parts: Iterable[EncodedPart], source: Path | str, stamp: object) -> Iterator[EncodedPart]:
    """Yield the parts, then raise BadData if the source changed since its stamp was taken.

    Otherwise the examples would be stored under the hash of other bytes, and later be used for those.
    """
    yield from parts
    if stamp_of(source) != stamp:
        raise changed_while_read(source)


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
