"""Dataset: the records of one run, read, checked, mixed, and split into training and evaluation."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy

from atomtune.analysis.holdout import Split, alike, held_out, overlapping
from atomtune.analysis.near_duplicates import Numbers
from atomtune.analysis.texts import Texts, texts_of_rows
from atomtune.batch.cost import sample_rows
from atomtune.choices import RUN_RECORD
from atomtune.console import Console
from atomtune.data.cache import EncodedData, concatenate, examples_of
from atomtune.data.encoded_source import Rules, records_of
from atomtune.data.encoding.chat_template import Template
from atomtune.data.ledger import Ledger, first_few, refuse_broken, refuse_unusable
from atomtune.data.reading.sources import distinct_names, fingerprint_of, joint_fingerprint, note_on_splits, size_of
from atomtune.data.records import Record
from atomtune.errors import BadData, BadSettings, listing
from atomtune.settings.train_settings import TrainSettings
from atomtune.train.arguments import shuffling_seed
from atomtune.train.defaults import FEWEST_HELD_OUT, DataSize, records_to_hold_out
from atomtune.train.run_context import RunContext
from atomtune.train.streaming import Stream

#: A key of run.json.
_LIKE_TRAINED_ONES = "eval_records_like_trained_ones"


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
        return Data(stream, evaluate, data_hash, eval_hash, evaluate_from=evaluate_from)
    parts = [_read(source, run, template) for source in run.settings.data.dataset_paths]
    data = concatenate(parts)
    _check_read(run, template, data)

    rows = list(range(len(data.examples)))
    eval_size = records_to_hold_out(run.settings, round(sum(_weighted(run, parts))), derived_before=run.derived_before)
    if eval_size:
        rows, rows_held_out = _hold_out(run, parts, size=eval_size)
        evaluate = _say_held_out(run, data.examples, rows, rows_held_out)
        evaluate_from = tuple(zip(run.settings.data.dataset_paths, _rows_of_each(parts, rows_held_out), strict=True))
    elif evaluate is not None:
        _say_overlap(run, [part.examples for part in parts], evaluate)
    if run.settings.data.mix:
        rows = _mixed_by_setting(rows, parts, run)
    chosen = eval_size if evaluate is not None else 0
    train = _selected(data.examples, rows)
    return Data(train, evaluate, data.data_hash, eval_hash, data.ledger, chosen, evaluate_from)


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


def _ends(parts: list[EncodedData]) -> list[int]:
    """The index after each file's last row, in the numbering of all rows."""
    return list(accumulate(len(part.examples) for part in parts))


def _rows_of_each(parts: list[EncodedData], rows: list[int]) -> list[int]:
    """How many of these rows each file has."""
    return [sum(start <= row < end for row in rows) for start, end in pairwise([0, *_ends(parts)])]


def _mixed_by_setting(rows: list[int], parts: list[EncodedData], run: RunContext) -> list[int]:
    """The rows of one epoch, following --mix."""
    mix = run.settings.data.mix
    ends = _ends(parts)
    rows = mixed(rows, ends, mix, seed=shuffling_seed(run.args))
    weights = ",".join(f"{weight:g}" for weight in mix)
    if not rows:
        raise BadSettings([f"--mix {weights} leaves no record of {ends[-1]:,} to train on. Pass larger numbers."])
    run.console.say(f"--mix {weights}: an epoch has {len(rows):,} records.")
    return rows


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
        if note := note_on_splits(source, source_names(run.settings)[source]):
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


def source_names(settings: TrainSettings) -> dict[str, str]:
    """Each source → its name in origins: enough of its path to tell files with the same name apart."""
    data = settings.data
    sources = [*data.dataset_paths, *([data.eval_path] if data.eval_path else [])]
    return dict(zip(sources, distinct_names(sources), strict=True))


def mixed(rows: list[int], ends: list[int], mix: list[float], *, seed: int) -> list[int]:
    """The rows of an epoch: each row of file f occurs mix[f] times, and a fraction of mix[f] is a random sample.

    ends  the index after each file's last row, in the numbering of `rows`
    """
    draw = random.Random(seed)
    chosen: list[int] = []
    for (start, end), weight in zip(pairwise([0, *ends]), mix, strict=True):
        own = [row for row in rows if start <= row < end]
        whole = int(weight)
        chosen += own * whole + sorted(draw.sample(own, round((weight - whole) * len(own))))
    return chosen


def _weighted(run: RunContext, parts: list[EncodedData]) -> list[float]:
    """How many records of each file count for the split: all of the file with the largest number in --mix."""
    mix = run.settings.data.mix or [1.0] * len(parts)
    return [len(part.examples) * weight / max(mix) for part, weight in zip(parts, mix, strict=True)]


def _quotas(run: RunContext, parts: list[EncodedData], wanted: int) -> tuple[Numbers, list[int]]:
    """(the file of each row, rows to hold out of each file), as evaluation is to reflect what an epoch has.

    Without --mix, all files count as one.
    """
    if not run.settings.data.mix:
        return numpy.zeros(sum(len(part.examples) for part in parts), dtype=numpy.int64), [wanted]
    files = numpy.repeat(numpy.arange(len(parts)), [len(part.examples) for part in parts])
    weighted = _weighted(run, parts)
    bounds = [round(wanted * until / sum(weighted)) for until in accumulate(weighted, initial=0.0)]
    return files, [end - start for start, end in pairwise(bounds)]


def _hold_out(run: RunContext, parts: list[EncodedData], *, size: float) -> tuple[list[int], list[int]]:
    """(rows to train on, rows to hold out); near-duplicates stay on one side."""
    records, weighted = sum(len(part.examples) for part in parts), round(sum(_weighted(run, parts)))
    wanted = round(size * weighted) if size < 1 else int(size)
    groups = alike(_texts(run, run.settings.data.dataset_paths, [part.examples for part in parts]))
    seed = shuffling_seed(run.args)
    by_itself = run.settings.data.eval_size is None
    split = held_out(groups, *_quotas(run, parts, wanted), is_asked_for=not by_itself, seed=seed)
    too_few = split.wanted < FEWEST_HELD_OUT or len(split.held_out) > 2 * split.wanted or not split.held_out
    if by_itself and (too_few or not split.learned):
        run.console.notice(
            f"no records are held out: too many of the {records:,} are near-duplicates or ask the same, and such "
            "records stay together. So the run cannot tell whether it works. --eval_path names records to evaluate on."
        )
        return list(range(records)), []
    if not (split.learned and split.held_out):
        raise BadSettings([f"--eval_size {size:g}: all {records:,} records are alike, so none can be held out fairly."])
    _say_fewer(run, split, wanted=wanted, by_itself=by_itself)
    return split.learned, split.held_out


def _say_fewer(run: RunContext, split: Split, *, wanted: int, by_itself: bool) -> None:
    """Give a notice if another number of records is held out than was wanted, because similar ones stay together."""
    if by_itself and split.wanted < wanted:
        run.console.notice(
            f"many records are near-duplicates or ask the same, and all of these are trained on. Of the others, a "
            f"share is held out: {len(split.held_out):,} records instead of {wanted:,}."
        )
    if len(split.held_out) != wanted and not by_itself:
        run.console.notice(
            f"--eval_size asks for {wanted:,} records, and {len(split.held_out):,} records are held out, because those "
            "that are nearly the same are kept together."
        )


def _say_overlap(run: RunContext, learned: list[datasets.Dataset], evaluate: datasets.Dataset) -> None:
    """Give a notice naming the evaluation records that are near-duplicates of training records."""
    settings = run.settings.data
    sources = [*settings.dataset_paths, str(settings.eval_path)]
    groups = alike(_texts(run, sources, [*learned, evaluate]))
    rows = overlapping(groups, sum(map(len, learned)))
    origins = evaluate.select(rows)["origin"][:]
    run.record.update(**{_LIKE_TRAINED_ONES: origins})
    if origins:
        run.console.notice(
            f"{len(origins):,} of {len(evaluate):,} evaluation records are nearly the same as a training record, at "
            f"least in the question: {first_few(origins, all_in=RUN_RECORD)}. Their loss shows what was memorised, not "
            "what was learned."
        )


def like_trained_ones(run: RunContext) -> list[str]:
    """The origins of the records of --eval_path that are near-duplicates of training records."""
    origins: list[str] = run.record.values.get(_LIKE_TRAINED_ONES, [])
    return origins


def _texts(run: RunContext, sources: list[str], stored: list[datasets.Dataset]) -> Texts:
    """The texts of these rows, which are read again."""
    return texts_of_rows(stored, partial(_reread, run, sources))


def _reread(run: RunContext, sources: list[str], stored: Sequence[datasets.Dataset]) -> Iterator[Record]:
    """The records of these rows, read once more with a progress bar."""
    rules = Rules(**run.settings.data.rules())
    for source, rows in zip(sources, stored, strict=True):
        name = source_names(run.settings)[source]
        with run.console.reading_progress(size_of(source), f"comparing {name}") as progress:
            yield from records_of(source, rules, rows, progress.advance, name=name)


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


def say_ledger(ledger: Ledger, template: Template, console: Console) -> None:
    """Print what became of the records in one line, and a notice for each thing a user may not expect."""
    console.say(
        f"{ledger.records_read:,} records read ({ledger.format}), {ledger.records_used:,} used, "
        f"{len(ledger.records_refused):,} refused, {ledger.records_cut:,} shortened; "
        f"{ledger.prompt_tokens:,} prompt and {ledger.target_tokens:,} target tokens; "
        f"template {template.name}, stops at {template.stop}."
    )
    for notice in (*ledger.sentences(), *_about_template(ledger, template), *_about_records(ledger)):
        console.notice(notice)


def _about_template(ledger: Ledger, template: Template) -> Iterator[str]:
    if ledger.split_origins:
        yield (
            f"template {template.name} writes an earlier answer differently once another turn follows it. In these "
            "records every answer is therefore an example of its own, with the prompt that a server would send: "
            f"{first_few(ledger.split_origins, all_in=RUN_RECORD)}."
        )
    if template.why:
        yield f"{template.why}."
    thoughts = template.about_thoughts(ledger.records_used, ledger.records_with_thoughts)
    if thoughts and not ledger.records_with_thoughts:
        yield f"{thoughts}."
    if not template.writes_bos:
        yield (
            f"template {template.name} does not begin with {template.tokenizer.bos_token}, the tokenizer's "
            "beginning-of-text token. Training leaves it out, as a server with this template does."
        )
    if template.unknown_controls:
        yield (
            f"template {template.name} uses {', '.join(template.unknown_controls)}, which this tokenizer does not have "
            "as control tokens: they are read as plain text. Another --template suits this model better."
        )


def _about_records(ledger: Ledger) -> Iterator[str]:
    if ledger.records_copied:
        yield f"Exact copies of earlier records: {ledger.records_copied:,}. Copies are trained on as well."
    if ledger.cut_origins:
        yield f"shortened to fit --max_seq_length: {first_few(ledger.cut_origins, all_in=RUN_RECORD)}."
    if ledger.control_origins:
        yield (
            "the text of these records contains control tokens such as an end-of-turn mark; they are kept as plain "
            f"text: {first_few(ledger.control_origins, all_in=RUN_RECORD)}."
        )
    if ledger.unknown_tokens:
        yield (
            f"{ledger.unknown_tokens:,} target tokens are the unknown token: this tokenizer cannot write that text, "
            "and the model learns the unknown token in its place."
        )
    if ledger.shared_instruction is not None:
        yield "nearly all records share one instruction; it is stored with the adapter as chat's default."
    refused = [f"{refusal.origin}  {refusal.reason}" for refusal in ledger.records_refused if not refusal.broken]
    if refused:
        yield f"not trained on:\n{listing(refused, 5)}"
