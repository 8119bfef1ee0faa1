"""Dataset: the records of one run, read and checked, to train and to evaluate on."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from atomtune.batch.cost import sample_rows
from atomtune.choices import RUN_RECORD
from atomtune.console import Console
from atomtune.data.cache import EncodedData, concatenate, examples_of
from atomtune.data.encoded_source import Rules, records_of
from atomtune.data.encoding.chat_template import Template
from atomtune.data.ledger import Ledger, refuse_broken, refuse_unusable
from atomtune.data.reading.sources import fingerprint_of, joint_fingerprint, notes_on, size_of
from atomtune.data.records import Record
from atomtune.errors import BadData
from atomtune.train.arguments import shuffling_seed
from atomtune.train.defaults import DataSize, records_to_hold_out
from atomtune.train.ledger_notices import say_ledger
from atomtune.train.run_context import RunContext
from atomtune.train.source_names import source_names
from atomtune.train.split import epoch_of_mix, hold_out, mix_text, rows_of_each, say_overlap, weighted
from atomtune.train.streaming import Stream


@dataclass(frozen=True)
class Data:
    """The examples that a run trains and evaluates on."""

    train: datasets.Dataset | Stream
    evaluate: datasets.Dataset | None
    data_hash: str
    eval_hash: str = ""  # hash of the file of --eval_path
    # Ledger of the records read before training; None for a stream, which is read during training
    stored_ledger: Ledger | None = None
    eval_size: float = 0  # --eval_size, or the value chosen for it: records, or a share below 1
    evaluate_from: tuple[tuple[str, int], ...] = ()  # (source, rows), in the order of the rows of `evaluate`

    @property
    def ledger(self) -> Ledger:
        """What became of every record; for a stream, of those read so far."""
        if self.stored_ledger is not None:
            return self.stored_ledger
        assert isinstance(self.train, Stream)
        return self.train.ledger

    @property
    def origins_held_out(self) -> list[str]:
        """The origins of the held-out records; empty if the records to evaluate on are those of --eval_path."""
        if self.evaluate is None or self.eval_hash:
            return []
        return list(self.evaluate["origin"][:])

    @property
    def size(self) -> DataSize:
        """How many records there are to train and evaluate on."""
        held_out = len(self.evaluate) if self.evaluate is not None else 0
        if isinstance(self.train, Stream):
            return DataSize(records=None, held_out=held_out, eval_size=0, longest_tokens=0)
        longest = self.ledger.longest_tokens
        return DataSize(records=len(self.train), held_out=held_out, eval_size=self.eval_size, longest_tokens=longest)

    def read_meanwhile(self, console: Console) -> dict[str, Any]:
        """Print and return a stream's ledger as far as it was read; {} for stored records, whose ledger was printed."""
        if not isinstance(self.train, Stream):
            return {}
        say_ledger(self.train.ledger, self.train.template, console)
        return _stream_to_run_json(self.train.ledger)

    def some(self, records: int, *, seed: int) -> list[dict[str, Any]]:
        """`records` training records drawn without replacement; of a stream, the first ones."""
        if isinstance(self.train, Stream):
            return list(itertools.islice(self.train, records))
        return list(self.train.select(sample_rows(len(self.train), records, seed=seed)))


def read_data(run: RunContext, template: Template) -> Data:
    """The examples to train and evaluate on.

    With several ranks, the first one encodes and the others read its cache.
    """
    evaluation = _evaluation_file(run, template)
    evaluate = evaluation.examples if evaluation else None
    eval_hash = evaluation.data_hash if evaluation else ""
    evaluate_from: tuple[tuple[str, int], ...] = ()
    if evaluate is not None:
        evaluate_from = ((str(run.settings.data.eval_path), len(evaluate)),)
    if run.settings.data.streaming:
        stream, data_hash = _stream(run, template)
        return Data(stream, evaluate, data_hash=data_hash, eval_hash=eval_hash, evaluate_from=evaluate_from)
    parts = [_read(source, run, template) for source in run.settings.data.dataset_paths]
    data = concatenate(parts)
    _check_read(run, template, data)

    rows, mix = list(range(len(data.examples))), run.settings.data.mix
    eval_size = records_to_hold_out(run.settings, round(sum(weighted(parts, mix))), derived_before=run.derived_before)
    if eval_size:
        rows, rows_held_out = hold_out(run, parts, size=eval_size)
        evaluate = _say_held_out(run, data.examples, rows, rows_held_out)
        evaluate_from = tuple(zip(run.settings.data.dataset_paths, rows_of_each(parts, rows_held_out), strict=True))
    elif evaluate is not None:
        say_overlap(run, [part.examples for part in parts], evaluate)
    if mix:
        rows = epoch_of_mix(rows, parts, mix, seed=shuffling_seed(run.args))
        weights = mix_text(mix)
        run.console.say(f"--mix {weights}: an epoch has {len(rows):,} records.")
    return Data(
        _selected(data.examples, rows),
        evaluate,
        data_hash=data.data_hash,
        eval_hash=eval_hash,
        stored_ledger=data.ledger,
        eval_size=eval_size if evaluate is not None else 0,
        evaluate_from=evaluate_from,
    )


def _check_read(run: RunContext, template: Template, data: EncodedData) -> None:
    """Print and record what became of every record. Raises BadData if records are broken or none can be used."""
    settings = run.settings.data
    run.record.update(data={"path": settings.dataset_path, "sha256": data.data_hash}, **data.ledger.to_run_json())
    say_ledger(data.ledger, template, run.console)
    refuse_unusable(data.ledger, settings.dataset_paths, all_in=RUN_RECORD)
    refuse_broken(data.ledger, skip_bad=settings.skip_bad, all_in=RUN_RECORD)


def _say_held_out(
    run: RunContext, examples: datasets.Dataset, rows: list[int], rows_held_out: list[int]
) -> datasets.Dataset | None:
    """The held-out records, printed and recorded; None if there are none."""
    if not rows_held_out:
        return None
    evaluate = examples.select(rows_held_out)
    run.record.update(records_held_out=evaluate["origin"][:])
    run.console.say(f"{len(evaluate):,} records are held out for evaluation; {len(rows):,} are trained on.")
    return evaluate


def _selected(examples: datasets.Dataset, rows: list[int]) -> datasets.Dataset:
    """These rows. All rows are returned without selecting, because a selection reads through an index table."""
    if rows == list(range(len(examples))):
        return examples
    return examples.select(rows)


def _evaluation_file(run: RunContext, template: Template) -> EncodedData | None:
    """The encoded records of --eval_path; None if it is not set."""
    settings = run.settings.data
    if not settings.eval_path:
        return None
    data = _read(settings.eval_path, run, template)
    run.record.update(evaluation={"path": settings.eval_path, "sha256": data.data_hash, **data.ledger.to_run_json()})
    run.console.say(f"{Path(settings.eval_path).name}, for evaluation:")
    say_ledger(data.ledger, template, run.console)
    refuse_unusable(data.ledger, [settings.eval_path], all_in=RUN_RECORD)
    refuse_broken(data.ledger, skip_bad=settings.skip_bad, all_in=RUN_RECORD)
    return data


def _stream(run: RunContext, template: Template) -> tuple[Stream, str]:
    """The records that are encoded during training, and a hash of the files they come from."""
    settings = run.settings.data

    def check(ledger: Ledger) -> None:
        try:
            refuse_broken(ledger, skip_bad=settings.skip_bad, all_in=RUN_RECORD)
        except BadData:
            run.record.update(**_stream_to_run_json(ledger))
            raise

    rules = Rules(**settings.rules())
    seed = shuffling_seed(run.args)
    stream = Stream(settings.dataset_paths, template, rules, buffer=settings.shuffle_buffer, seed=seed, check=check)
    data_hash = joint_fingerprint([fingerprint_of(source) for source in settings.dataset_paths])
    run.record.update(data={"path": settings.dataset_path, "sha256": data_hash})
    run.console.say(
        f"streaming {', '.join(settings.dataset_paths)}: records are encoded while training and shuffled in a buffer "
        f"of {settings.shuffle_buffer:,}."
    )
    for source in settings.dataset_paths:
        for note in notes_on(source, source_names(run.settings)[source]):
            run.console.notice(note)
    try:
        next(iter(stream))  # reports problems of the first records before the model is loaded
    finally:
        run.record.update(**_stream_to_run_json(stream.ledger))
    return stream, data_hash


def _stream_to_run_json(ledger: Ledger) -> dict[str, Any]:
    """The keys of run.json for the records that a stream has read."""
    return {**ledger.to_run_json(), "records_copied": None}  # finding copies needs all records at once


def _read(source: str, run: RunContext, template: Template) -> EncodedData:
    name = source_names(run.settings)[source]
    rules = Rules(**run.settings.data.rules())
    with run.args.main_process_first(), run.console.reading_progress(size_of(source), f"reading {name}") as progress:
        data = examples_of(source, template, rules, name=name, advance=progress.advance)
    for note in data.notes:
        run.console.notice(note)
    return data


def evaluation_records(run: RunContext, data: Data, rows: Sequence[int]) -> dict[int, Record]:
    """Row → its record, for these rows of `data.evaluate`, in ascending order.

    Each file is read once more, up to the last of its rows.
    """
    assert data.evaluate is not None
    rules = Rules(**run.settings.data.rules())
    names = source_names(run.settings)
    records: dict[int, Record] = {}
    start = 0
    for source, count in data.evaluate_from:
        own_rows = [row for row in rows if start <= row < start + count]
        if own_rows:
            own_records = records_of(source, rules, data.evaluate.select(own_rows), name=names[source])
            records.update(zip(own_rows, own_records, strict=True))
        start += count
    return records
