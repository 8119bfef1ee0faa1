"""Split: which records of a run are held out for evaluation, and how often the others occur in an epoch."""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise

import datasets
import numpy

from atomtune.analysis.holdout import Split, alike, held_out, overlapping
from atomtune.analysis.near_duplicates import Numbers
from atomtune.analysis.texts import Texts, texts_of_rows
from atomtune.choices import RUN_RECORD
from atomtune.data.cache import EncodedData
from atomtune.data.encoded_source import Rules, records_of
from atomtune.data.ledger import first_few
from atomtune.data.reading.sources import size_of
from atomtune.data.records import Record
from atomtune.errors import BadSettings
from atomtune.train.arguments import shuffling_seed
from atomtune.train.defaults import FEWEST_HELD_OUT, held_out_count
from atomtune.train.run_context import RunContext
from atomtune.train.source_names import source_names

#: A key of run.json.
_LIKE_TRAINED_ONES = "eval_records_like_trained_ones"


def hold_out(run: RunContext, parts: list[EncodedData], *, size: float) -> tuple[list[int], list[int]]:
    """(rows to train on, rows to hold out); near-duplicates stay on one side."""
    records = sum(len(part.examples) for part in parts)
    wanted = held_out_count(size, round(sum(weighted(parts, run.settings.data.mix))))
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


def weighted(parts: list[EncodedData], mix: list[float]) -> list[float]:
    """How many records of each file count for the split: all of the file with the largest number in --mix.

    mix  as in the settings: empty if all records occur once
    """
    weights = mix or [1.0] * len(parts)
    return [len(part.examples) * weight / max(weights) for part, weight in zip(parts, weights, strict=True)]


def _quotas(run: RunContext, parts: list[EncodedData], wanted: int) -> tuple[Numbers, list[int]]:
    """(the file of each row, rows to hold out of each file), as evaluation is to reflect what an epoch has.

    Without --mix, all files count as one.
    """
    if not run.settings.data.mix:
        return numpy.zeros(sum(len(part.examples) for part in parts), dtype=numpy.int64), [wanted]
    files = numpy.repeat(numpy.arange(len(parts)), [len(part.examples) for part in parts])
    counts = weighted(parts, run.settings.data.mix)
    bounds = [round(wanted * until / sum(counts)) for until in accumulate(counts, initial=0.0)]
    return files, [end - start for start, end in pairwise(bounds)]


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


def say_overlap(run: RunContext, learned: list[datasets.Dataset], evaluate: datasets.Dataset) -> None:
    """Give a notice naming the evaluation records that are near-duplicates of training records."""
    groups = alike(_texts(run, run.settings.data.sources, [*learned, evaluate]))
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


def epoch_of_mix(rows: list[int], parts: list[EncodedData], mix: list[float], *, seed: int) -> list[int]:
    """The rows of one epoch, following --mix. Raises BadSettings if there are none."""
    ends = _ends(parts)
    rows = _mixed(rows, ends, mix, seed=seed)
    if not rows:
        weights = mix_text(mix)
        raise BadSettings([f"--mix {weights} leaves no record of {ends[-1]:,} to train on. Pass larger numbers."])
    return rows


def mix_text(mix: list[float]) -> str:
    """The numbers of --mix as they are written on the command line."""
    return ",".join(f"{weight:g}" for weight in mix)


def _mixed(rows: list[int], ends: list[int], mix: list[float], *, seed: int) -> list[int]:
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


def rows_of_each(parts: list[EncodedData], rows: list[int]) -> list[int]:
    """How many of these rows each file has."""
    return [sum(start <= row < end for row in rows) for start, end in pairwise([0, *_ends(parts)])]


def _ends(parts: list[EncodedData]) -> list[int]:
    """The index after each file's last row, in the numbering of all rows."""
    return list(accumulate(len(part.examples) for part in parts))
