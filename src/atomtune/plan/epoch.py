"""Epoch: the records that a run reads, as `plan` counts them."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets

from atomtune.console import Console
from atomtune.data.cache import EncodedData, concatenate, examples_of
from atomtune.data.encoded_source import Rules
from atomtune.data.encoding.chat_template import Template
from atomtune.data.ledger import refuse_broken, refuse_unusable
from atomtune.data.reading.sources import size_of
from atomtune.settings.train_settings import TrainSettings
from atomtune.train.defaults import held_out_count
from atomtune.train.source_names import source_names
from atomtune.train.split import epoch_of_mix, weighted


@dataclass(frozen=True)
class Epoch:
    """The records of one epoch, before some of them are held out.

    rows            rows of the cache; with --mix some occur several times, and others not at all
    records         number of records of which --eval_size holds some out: with --mix, all of the file with the largest
                    number count, and a share of the others
    target_tokens   learned tokens of all rows
    longest_tokens  tokens of the longest example
    """

    rows: datasets.Dataset
    records: int
    target_tokens: float
    longest_tokens: int

    def held_out(self, eval_size: float) -> int:
        """The number of records that are held out; the run's may differ, as it keeps near-duplicates together."""
        return min(held_out_count(eval_size, self.records), self.records - 1)

    def learned(self, eval_size: float) -> int:
        """The number of rows that are trained on in an epoch."""
        return max(1, round(len(self.rows) * (1 - self.held_out(eval_size) / self.records)))


def epoch_of(settings: TrainSettings, template: Template, console: Console, *, seed: int) -> Epoch:
    """Encode the records of --dataset_path, which the run then finds in the cache. Raises BadData as the run would."""
    parts = encoded(settings.data.dataset_paths, settings, template, console)
    data, mix = concatenate(parts), settings.data.mix
    rows, target_tokens = data.examples, float(data.ledger.target_tokens)
    if mix:
        rows = rows.select(epoch_of_mix(list(range(len(rows))), parts, mix, seed=seed))
        target_tokens = sum(part.ledger.target_tokens * weight for part, weight in zip(parts, mix, strict=True))
    return Epoch(rows, round(sum(weighted(parts, mix))), target_tokens, data.ledger.longest_tokens)


def encoded(paths: Sequence[str], settings: TrainSettings, template: Template, console: Console) -> list[EncodedData]:
    """The encoded records of each file, after a line about all of them. Raises BadData as the run would."""
    rules, names = Rules(**settings.data.rules()), source_names(settings)
    parts = []
    for path in paths:
        name = names[path]
        with console.reading_progress(size_of(path), f"reading {name}") as progress:
            parts.append(examples_of(path, template, rules, name=name, advance=progress.advance))
    ledger = concatenate(parts).ledger
    refuse_unusable(ledger, paths)
    refuse_broken(ledger, skip_bad=settings.data.skip_bad)
    console.say(
        f"{ledger.records_read:,} records read, {len(ledger.records_refused):,} refused; "
        f"{ledger.prompt_tokens:,} prompt and {ledger.target_tokens:,} target tokens."
    )
    return parts
