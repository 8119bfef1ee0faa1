"""Report: everything that inspect finds in a data set, which it reads like a run.

The Examples are those that a run would train on, from the same cache.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import datasets
import numpy
import pyarrow
import pyarrow.compute
from numpy.typing import NDArray

from atomtune.analysis.texts import Texts, texts_of_rows
from atomtune.batch.cost import SAMPLED_BATCHES, LayoutTokens, batches_of, sample_rows
from atomtune.choices import USUAL_BATCH, Check
from atomtune.console import Console
from atomtune.data.cache import EncodedData, concatenate, examples_of
from atomtune.data.encoded_source import Rules, records_of
from atomtune.data.encoding.chat_template import Template
from atomtune.data.example_table import as_examples
from atomtune.data.ledger import Ledger
from atomtune.data.reading.sources import distinct_names, size_of
from atomtune.data.records import Example, Record, RefusalKind
from atomtune.inspect.checks import Finding, Tokens, findings_of, read_tokens
from atomtune.inspect.histogram import Limit, limit_at, suggested
from atomtune.settings.command_settings import InspectSettings
from atomtune.shared_prefix import shared_length

#: A max_tokens larger than any record: nothing is shortened or refused for its length.
_NO_LIMIT = 2**31 - 1
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Saving:
    """The number of tokens that each layout computes for sampled batches, and the prefix that all records share."""

    batches: int
    records_per_batch: int
    tokens: LayoutTokens
    shared_prefix: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """Everything that inspect finds."""

    sources: tuple[str, ...]
    template: Template
    max_tokens: int
    ledger: Ledger
    parts: tuple[datasets.Dataset, ...]  # the rows of each source
    stored: datasets.Dataset  # all of them, one source after another
    texts: Texts
    tokens: Tokens
    findings: Mapping[Check, Finding]
    limits: tuple[Limit, ...]  # for max_tokens, for a length that no record exceeds, for one that under 1 % exceed
    saving: Saving | None
    notes: tuple[str, ...] = ()

    def origin(self, row: int) -> str:
        return str(self.stored[row]["origin"])

    def examples(self, row: int) -> tuple[Example, ...]:
        return as_examples(self.stored[row])


@dataclass(frozen=True)
class _Source:
    """One data source, its name in origins, and the rules for reading it."""

    path: str
    name: str
    template: Template
    rules: Rules
    console: Console

    def encode(self, rules: Rules) -> EncodedData:
        with self.console.reading_progress(size_of(self.path), f"reading {self.name}") as progress:
            return examples_of(self.path, self.template, rules, name=self.name, advance=progress.advance)

    def records(self, stored: datasets.Dataset) -> Iterator[Record]:
        """The records of the stored rows, read again for their texts."""
        with self.console.reading_progress(size_of(self.path), f"comparing {self.name}") as progress:
            yield from records_of(self.path, self.rules, stored, progress.advance, name=self.name)


def build_report(settings: InspectSettings, template: Template, console: Console, *, most_tokens: int) -> Report:
    """Read all records and run all checks. Raises BadData for a source that cannot be read.

    most_tokens  the longest record that the base model and the memory allow
    """
    rules = Rules(**settings.rules())
    paths = settings.dataset_paths
    sources = []
    for path, name in zip(paths, distinct_names(paths), strict=True):
        sources.append(_Source(path, name, template, rules, console))
    parts = [source.encode(rules) for source in sources]
    data = concatenate(parts)
    ledger, stored = data.ledger, data.examples

    texts = texts_of_rows([part.examples for part in parts], partial(_reread, sources))
    assert len(texts.near) == len(stored), "the texts and the tokens of a record stand at the same place"
    stop_ids = template.tokenizer.convert_tokens_to_ids(list(template.stops))
    tokens = read_tokens(_tables(stored), stops=stop_ids, unknown=template.unknown_id)

    whole_lengths = tokens.longest
    if ledger.records_cut or ledger.refused_as(RefusalKind.TOO_LONG):
        whole_lengths = _whole_lengths(sources, rules)
    saving = None
    if len(stored):
        per_batch = settings.per_device_train_batch_size or USUAL_BATCH
        saving = _saving(stored, per_batch=per_batch, seed=settings.seed)
    return Report(
        sources=tuple(paths),
        template=template,
        max_tokens=rules.max_tokens,
        ledger=ledger,
        parts=tuple(part.examples for part in parts),
        stored=stored,
        texts=texts,
        tokens=tokens,
        findings=findings_of(ledger, texts, tokens, _rows_named(parts)),
        limits=_limits(whole_lengths, rules.max_tokens, most_tokens=most_tokens),
        saving=saving,
        notes=data.notes,
    )


def _reread(sources: Sequence[_Source], stored: Sequence[datasets.Dataset]) -> Iterator[Record]:
    """The records of each source's rows, read again for their texts."""
    for source, examples in zip(sources, stored, strict=True):
        yield from source.records(examples)


def _limits(lengths: NDArray[numpy.int32], max_tokens: int, *, most_tokens: int) -> tuple[Limit, ...]:
    if not len(lengths):
        return ()
    return (limit_at(lengths, max_tokens), *suggested(lengths, most=most_tokens))


def _whole_lengths(sources: Iterable[_Source], rules: Rules) -> NDArray[numpy.int32]:
    """[records] Their lengths without shortening, including records that were refused for their length."""
    without_limit = replace(rules, max_tokens=_NO_LIMIT)
    stored = [source.encode(without_limit).examples for source in sources]
    return read_tokens(chain.from_iterable(map(_tables, stored)), stops=(), unknown=None).longest


def _tables(stored: datasets.Dataset) -> Iterator[pyarrow.Table]:
    return iter(stored.with_format("arrow").iter(_ROWS_AT_ONCE))


def _rows_named(parts: Sequence[EncodedData]) -> dict[str, NDArray[numpy.int64]]:
    """The rows of the checks `cut` and `control`, which the ledger lists by origin; numbered over all sources."""
    return {
        "cut": numpy.flatnonzero(_marks([(part.examples, part.ledger.cut_origins) for part in parts])),
        "control": numpy.flatnonzero(_marks([(part.examples, part.ledger.control_origins) for part in parts])),
    }


def _marks(parts: Iterable[tuple[datasets.Dataset, Sequence[str]]]) -> NDArray[numpy.bool_]:
    """[records] Whether each is in the list of origins of its own source: two sources may have equal origins."""
    marks = [numpy.zeros(0, dtype=bool)]
    for stored, origins in parts:
        named = pyarrow.array(origins, pyarrow.string())
        for table in _tables(stored):
            marks.append(pyarrow.compute.is_in(table["origin"], named).to_numpy())
    return numpy.concatenate(marks)


def _saving(stored: datasets.Dataset, *, per_batch: int, seed: int) -> Saving:
    """What each layout computes for randomly sampled batches."""
    rows = stored.select(sample_rows(len(stored), per_batch * SAMPLED_BATCHES, seed=seed))
    batches = batches_of(rows, per_batch, as_examples)
    all_ids = [example.ids for example in chain(*batches)]
    shared: tuple[int, ...] = ()
    if len(all_ids) > 1:
        # In lexicographic order, all ids between the first and the last have the prefix that these two share.
        first, last = min(all_ids), max(all_ids)
        shared = first[: shared_length(first, last)]
    return Saving(len(batches), per_batch, LayoutTokens.of(batches), shared)
