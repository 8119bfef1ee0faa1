"""Data: the records of one run, read, checked, mixed, split and said.

Before: run.py decides where to start.  After: prepare.py loads the model, trainer.py draws batches.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import datasets

from atomtune.analysis.holdout import alike, held_out, overlapping
from atomtune.analysis.texts import read_texts
from atomtune.batch.cost import sample_rows
from atomtune.console import Console
from atomtune.data.cache import EncodedData, Rules, concatenate, examples_of, records_of
from atomtune.data.encoding.chat_template import Template
from atomtune.data.ledger import Ledger
from atomtune.data.reading.sources import fingerprint_of, size_of
from atomtune.data.records import Record
from atomtune.errors import BadData, BadSettings, listing
from atomtune.train.run_context import Job
from atomtune.train.streaming import Stream


@dataclass(frozen=True)
class Data:
    """What one run learns from and is measured on."""

    train: datasets.Dataset | Stream
    evaluate: datasets.Dataset | None
    data_hash: str
    eval_hash: str = ""  # of the file of --eval_path
    stored: Ledger | None = None  # of what was read before training; a stream is read while training

    @property
    def ledger(self) -> Ledger:
        """Where every record went; of a stream, as far as it was read."""
        if self.stored is not None:
            return self.stored
        assert isinstance(self.train, Stream)
        return self.train.ledger

    def read_meanwhile(self, console: Console) -> dict[str, Any]:
        """Say and give the ledger of a stream as far as it was read; of stored records all was said before."""
        if not isinstance(self.train, Stream):
            return {}
        say_ledger(self.train.ledger, self.train.template, console)
        return {**self.train.ledger.to_run_json(), "records_copied": None}  # to tell copies takes all records at once

    def some(self, records: int, *, seed: int) -> list[dict[str, Any]]:
        """So many of the training records at random, without putting back; of a stream, the first."""
        if isinstance(self.train, Stream):
            return list(itertools.islice(self.train, records))
        return list(self.train.select(sample_rows(len(self.train), records, seed=seed)))


def read_data(job: Job, template: Template) -> Data:
    """The examples to train and evaluate on; on several ranks the first one encodes, the others read the store."""
    evaluate, eval_hash = _to_evaluate(job, template)
    asked, console = job.settings.data, job.console
    if asked.streaming:
        return Data(_stream(job, template), evaluate, job.record.values["data"]["sha256"], eval_hash)
    names = [Path(source).name for source in asked.dataset_paths]
    if len(set(names)) < len(names):
        console.notice("some of these files have one name; where a record of theirs is named, look into each.")
    parts = [_read(source, job, template) for source in asked.dataset_paths]
    data = concatenate(parts)
    examples, ledger = data.examples, data.ledger
    job.record.update(data={"path": asked.dataset_path, "sha256": data.data_hash}, **ledger.to_run_json())
    say_ledger(ledger, template, console)
    _refuse_broken(ledger, skip_bad=asked.skip_bad)
    _refuse_empty(ledger, ", ".join(asked.dataset_paths))
    learned = list(range(len(examples)))
    if asked.eval_size:
        learned, held = _held_out(job, parts)
        evaluate = examples.select(held)
        job.record.update(records_held_out=evaluate["origin"][:])
        console.say(f"{len(held):,} records are held out to evaluate on, {len(learned):,} to train on.")
    elif evaluate is not None:
        _say_overlap(job, [part.examples for part in parts], evaluate)
    ends = list(accumulate(len(part.examples) for part in parts))
    drawn = mixed(learned, ends, asked.mix, seed=job.args.seed)
    if asked.mix:
        console.say(f"mixed as {asked.mix}: an epoch sees {len(drawn):,} records.")
    train = examples if len(drawn) == len(examples) and not asked.mix else examples.select(drawn)
    return Data(train, evaluate, data.data_hash, eval_hash, ledger)


def _to_evaluate(job: Job, template: Template) -> tuple[datasets.Dataset | None, str]:
    """The records of --eval_path, and the hash of that file."""
    asked, console = job.settings.data, job.console
    if not asked.eval_path:
        return None, ""
    data = _read(asked.eval_path, job, template)
    console.say(f"{Path(asked.eval_path).name}, to evaluate on:")
    say_ledger(data.ledger, template, console)
    _refuse_broken(data.ledger, skip_bad=asked.skip_bad)
    _refuse_empty(data.ledger, asked.eval_path)
    return data.examples, data.data_hash


def _stream(job: Job, template: Template) -> Stream:
    asked, console = job.settings.data, job.console
    names = ", ".join(asked.dataset_paths)

    def check(ledger: Ledger) -> None:
        _refuse_broken(ledger, skip_bad=asked.skip_bad)

    rules = Rules(**asked.rules())
    stream = Stream(asked.dataset_paths, template, rules, buffer=asked.shuffle_buffer, seed=job.args.seed, check=check)
    data_hash = hashlib.sha256("".join(map(fingerprint_of, asked.dataset_paths)).encode()).hexdigest()
    job.record.update(data={"path": asked.dataset_path, "sha256": data_hash})
    console.say(
        f"streaming {names}: encoded while training, each record drawn from {asked.shuffle_buffer:,} that wait."
    )
    next(iter(stream))  # what is wrong with the first records is said before the model is loaded
    return stream


def _read(source: str, job: Job, template: Template) -> EncodedData:
    name = Path(source).name
    with job.args.main_process_first(), job.console.reading_progress(size_of(source), f"reading {name}") as reading:
        return examples_of(source, template, Rules(**job.settings.data.rules()), advance=reading.advance)


def mixed(rows: list[int], ends: list[int], mix: list[float], *, seed: int) -> list[int]:
    """The rows of an epoch: those of file f stand in it mix[f] times, a fraction of them drawn by the seed.

    ends  where each file's rows end in the numbering of rows
    """
    if not mix:
        return rows
    draw = random.Random(seed)
    chosen: list[int] = []
    for (start, end), weight in zip(pairwise([0, *ends]), mix, strict=True):
        own = [row for row in rows if start <= row < end]
        whole = int(weight)
        chosen += own * whole + sorted(draw.sample(own, round((weight - whole) * len(own))))
    return chosen


def _held_out(job: Job, parts: list[EncodedData]) -> tuple[list[int], list[int]]:
    """(rows to learn, rows to hold out), whatever is alike on one side."""
    size, records = job.settings.data.eval_size, sum(len(part.examples) for part in parts)
    held = round(size * records) if size < 1 else int(size)
    if not 0 < held < records:
        raise BadSettings([f"--eval_size {size:g} holds out {held} of {records} records."])
    groups = alike(read_texts(_texts(job, job.settings.data.dataset_paths, [part.examples for part in parts])))
    rows = held_out(groups, held, seed=job.args.data_seed or job.args.seed)
    if not rows[0]:
        raise BadSettings([f"--eval_size {size:g}: all {records:,} records are alike, so none can be held out fairly."])
    if len(rows[1]) != held:
        job.console.notice(
            f"--eval_size asks for {held:,} records; groups of records that are alike allow {len(rows[1]):,}."
        )
    return rows


def _say_overlap(job: Job, learned: list[datasets.Dataset], evaluate: datasets.Dataset) -> None:
    """Say which evaluation records are like ones that are learned."""
    asked = job.settings.data
    sources = [*asked.dataset_paths, str(asked.eval_path)]
    groups = alike(read_texts(_texts(job, sources, [*learned, evaluate])))
    like = overlapping(groups, sum(map(len, learned)))
    origins = evaluate.select(like)["origin"][:]
    job.record.update(eval_records_like_trained_ones=origins)
    if origins:
        job.console.notice(
            f"{len(origins):,} of {len(evaluate):,} evaluation records are nearly the same as a trained one or ask the "
            f"same: {_some(origins)}. Their loss says how well they were learned by heart."
        )


def _texts(job: Job, sources: list[str], stored: list[datasets.Dataset]) -> Iterator[Record]:
    """The records behind the rows, read once more, with a bar."""
    rules = Rules(**job.settings.data.rules())
    for source, rows in zip(sources, stored, strict=True):
        with job.console.reading_progress(size_of(source), f"comparing {Path(source).name}") as reading:
            yield from records_of(source, rules, rows, reading.advance)


def say_ledger(ledger: Ledger, template: Template, console: Console) -> None:
    console.say(
        f"{ledger.records_read:,} records read ({ledger.format}), {ledger.records_used:,} used, "
        f"{len(ledger.records_refused):,} refused, {ledger.records_cut:,} shortened; "
        f"{ledger.prompt_tokens:,} prompt and {ledger.target_tokens:,} target tokens; "
        f"template {template.name}, stops at {template.stop}."
    )
    for said, count in ledger.notices.items():
        console.notice(f"{said} in {count:,} records.")
    if ledger.records_copied:
        console.notice(f"{ledger.records_copied:,} records are copies of another and are learned once more.")
    if ledger.split_origins:
        console.notice(
            "a server would send other tokens before a later answer than the earlier one was learned as; so these are "
            f"several examples each, what they share computed once: {_some(ledger.split_origins)}."
        )
    if not template.writes_bos:
        console.notice(
            f"the template {template.name} writes no {template.tokenizer.bos_token}, which this tokenizer has for a "
            "text's beginning; so training has none, as servers that render it have none."
        )
    if template.unknown_controls:
        console.notice(
            f"the template {template.name} writes {', '.join(template.unknown_controls)}, which are text to this "
            "tokenizer, not control tokens. The model's own template, or atom, suits it better."
        )
    if ledger.cut_origins:
        console.notice(f"shortened to fit --max_seq_length: {_some(ledger.cut_origins)}.")
    if ledger.control_origins:
        console.notice(f"control strings in the text stay text in: {_some(ledger.control_origins)}.")
    if ledger.unknown_tokens:
        console.notice(
            f"{ledger.unknown_tokens:,} target tokens are unknown to this tokenizer and are learned as such."
        )
    if ledger.shared_instruction is not None:
        console.notice("nearly all records share one instruction; it is stored with the adapter as chat's default.")
    refused = [refusal for refusal in ledger.records_refused if not refusal.broken]
    if refused:
        console.notice(f"not trained on:\n{listing([f'{r.origin}  {r.reason}' for r in refused], 5)}")


def _some(origins: list[str], shown: int = 5) -> str:
    rest = len(origins) - shown
    return ", ".join(origins[:shown]) + (f" and {rest:,} more (all in run.json)" if rest > 0 else "")


def _refuse_broken(ledger: Ledger, *, skip_bad: bool) -> None:
    """Raise BadData with every broken record, unless they are to be skipped."""
    broken = ledger.broken
    if broken and not skip_bad:
        good = ledger.records_read - len(broken)
        raise BadData(
            f"{listing([f'{r.origin}  {r.reason}.' for r in broken])}\n"
            f"{len(broken):,} of {ledger.records_read:,} records refused (all in run.json)."
            + (f" --skip_bad trains on the other {good:,}." if good else "")
        )


def _refuse_empty(ledger: Ledger, path: str) -> None:
    if not ledger.records_used:
        first = ledger.records_refused[0]
        raise BadData(f"{path}: none of {ledger.records_read:,} records can be used. {first.origin}: {first.reason}.")
