"""Findings: all that is found in a data set, by reading it the way a run does.

Before: inspect.py hands the settings over.  After: summary.py says it in the terminal, page.py shows it in a browser.
The walk ends after Example: these are the very tokens a run would train on, from the same store.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import datasets
import numpy
import pyarrow
import pyarrow.compute

from atomtune.analysis.near_duplicates import Numbers
from atomtune.analysis.texts import Texts, read_texts
from atomtune.batch.cost import SAMPLED_BATCHES, LayoutTokens, batches_of, sample_rows
from atomtune.console import Console
from atomtune.data.cache import EncodedData, Rules, as_examples, concatenate, examples_of, records_of
from atomtune.data.encoding.chat_template import Template
from atomtune.data.ledger import Ledger
from atomtune.data.reading.sources import size_of
from atomtune.data.records import Example, Record, RefusalKind
from atomtune.inspect.checks import Problem, Tokens, problems_of, read_tokens
from atomtune.inspect.histogram import Limit, limit_at, suggested
from atomtune.settings.fields import InspectSettings

#: Longer than any record: with it, nothing is shortened or refused for its length.
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Saving:
    """Tokens that each layout computes for the batches drawn, and the beginning all of their records share."""

    batches: int
    records_per_batch: int
    tokens: LayoutTokens
    trunk: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """All that inspect finds."""

    sources: tuple[str, ...]
    template: Template
    max_tokens: int
    ledger: Ledger
    stored: datasets.Dataset
    texts: Texts
    tokens: Tokens
    problems: dict[str, Problem]
    limits: tuple[Limit, ...]  # the one asked for, one that nothing is longer than, one that under 1 % are longer than
    saving: Saving | None

    def origin(self, row: int) -> str:
        return str(self.stored[row]["origin"])

    def examples(self, row: int) -> tuple[Example, ...]:
        return as_examples(self.stored[row])


def look(settings: InspectSettings, template: Template, console: Console) -> Report:
    """Read everything and find what there is to find."""
    rules = Rules(**settings.rules())
    parts = [_read(source, template, rules, console) for source in settings.dataset_paths]
    data = concatenate(parts)
    stored, ledger = data.examples, data.ledger
    records = chain.from_iterable(
        _used(source, rules, part.examples, console) for source, part in zip(settings.dataset_paths, parts, strict=True)
    )
    texts = read_texts(records)
    assert len(texts.near) == len(stored), "the texts and the tokens of a record stand at the same place"
    stop = template.tokenizer.convert_tokens_to_ids(template.stop)
    tokens = read_tokens(_tables(stored), stop=stop, unknown=template.tokenizer.unk_token_id)
    longest = tokens.longest
    if ledger.records_cut or ledger.refused_as(RefusalKind.TOO_LONG):
        longest = _whole_lengths(settings.dataset_paths, template, rules, console)
    named = {
        "cut": _where([(part.examples, part.ledger.cut_origins) for part in parts]),
        "control": _where([(part.examples, part.ledger.control_origins) for part in parts]),
    }
    return Report(
        tuple(settings.dataset_paths),
        template,
        rules.max_tokens,
        ledger,
        stored,
        texts,
        tokens,
        problems_of(ledger, texts, tokens, named),
        (limit_at(longest, rules.max_tokens), *suggested(longest)) if len(longest) else (),
        _saving(stored, per_batch=settings.per_device_train_batch_size, seed=settings.seed) if len(stored) else None,
    )


def _read(source: str, template: Template, rules: Rules, console: Console) -> EncodedData:
    with console.reading_progress(size_of(source), f"reading {Path(source).name}") as reading:
        return examples_of(source, template, rules, advance=reading.advance)


def _used(source: str, rules: Rules, stored: datasets.Dataset, console: Console) -> Iterator[Record]:
    with console.reading_progress(size_of(source), f"comparing {Path(source).name}") as reading:
        yield from records_of(source, rules, stored, reading.advance)


def _whole_lengths(sources: Iterable[str], template: Template, rules: Rules, console: Console) -> Numbers:
    """How long the records are where nothing is shortened, those included that are refused for their length."""
    whole = replace(rules, max_tokens=_NO_LIMIT)
    stored = [_read(source, template, whole, console).examples for source in sources]
    return read_tokens(chain.from_iterable(map(_tables, stored)), stop=0, unknown=None).longest


def _tables(stored: datasets.Dataset) -> Iterator[pyarrow.Table]:
    return iter(stored.with_format("arrow").iter(1000))


def _where(named: Iterable[tuple[datasets.Dataset, Sequence[str]]]) -> Numbers:
    """The rows of these origins, each looked for in its own file: a/train.jsonl and b/train.jsonl have equal ones."""
    marks = [numpy.zeros(0, dtype=bool)]
    for part, origins in named:
        wanted = pyarrow.array(origins, pyarrow.string())
        marks += [pyarrow.compute.is_in(table["origin"], wanted).to_numpy() for table in _tables(part)]
    return numpy.flatnonzero(numpy.concatenate(marks))


def _saving(stored: datasets.Dataset, *, per_batch: int, seed: int) -> Saving:
    """What each layout computes for batches drawn as the sampler draws them."""
    rows = stored.select(sample_rows(len(stored), per_batch * SAMPLED_BATCHES, seed=seed))
    batches = batches_of(rows, per_batch, as_examples)
    every = list(chain(*batches))
    first, last = min(one.ids for one in every), max(one.ids for one in every)  # what these share, all share
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return Saving(
        len(batches),
        per_batch,
        LayoutTokens.of(batches),
        first[:shared] if len(every) > 1 else (),
    )
