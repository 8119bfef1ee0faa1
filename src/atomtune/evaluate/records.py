"""Records: which ones are evaluated, as each model's template writes them, and what became of the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from atomtune.batch.cost import sample_rows
from atomtune.console import Console
from atomtune.data.encoded_source import Rules
from atomtune.data.encoding.chat_template import Template
from atomtune.data.ledger import Ledger, listed_refusals, refuse_unusable
from atomtune.errors import BadData, BadSettings
from atomtune.evaluate.account import Account, account_of
from atomtune.evaluate.models import Candidates
from atomtune.evaluate.questions import EvalRecord, Key, read_records
from atomtune.evaluate.run_folder import RunRecords, refuse_changed_files, run_file, run_records
from atomtune.model.base_shape import refuse_too_few_positions
from atomtune.model.load import read_config
from atomtune.settings.command_settings import EvaluateSettings
from atomtune.settings.run_settings import RecordSettings


@dataclass(frozen=True)
class ToRead:
    """Which records are read, and how."""

    sources: list[str]
    reading: RecordSettings
    wanted: frozenset[str] | None  # origins, for example "train.jsonl:17"; None: all records


def what_to_read(settings: EvaluateSettings) -> ToRead:
    """The records of --dataset_path, else those that the run of the first adapter held out."""
    run = run_records(Path(settings.adapter_path[0])) if settings.adapter_path else None
    if settings.dataset_path:
        own = {name: getattr(settings, name) for name in ("dataset_path", "format", "keys", "roles")}
        learn = run.reading.learn if run else "all"
        reading = RecordSettings(**own, learn=learn)
        return ToRead(reading.dataset_paths, reading, None)
    return _held_out_by(Path(settings.adapter_path[0]), run)


def _held_out_by(folder: Path, run: RunRecords | None) -> ToRead:
    """The records that a run held out. Raises BadSettings where there are none, or its run.json does not say which."""
    file = run_file(folder)
    if file is None:
        raise BadSettings([f"{folder} has no run.json. Pass --dataset_path with records to evaluate on."])
    if run is not None and run.eval_path:
        return ToRead([run.eval_path], run.reading, None)
    if run is None or not run.reading.dataset_paths:
        path, _ = file
        raise BadSettings(
            [f"{path} does not say which records the run used. Pass --dataset_path with records to evaluate on."]
        )
    if not run.held_out:
        raise BadSettings(
            [
                f"The run in {folder} held no records out (--eval_size, --eval_path). "
                "Pass --dataset_path with records that it was not trained on."
            ]
        )
    return ToRead(run.reading.dataset_paths, run.reading, run.held_out)


@dataclass(frozen=True)
class ReadRecords:
    """The records to evaluate, as each model's template writes them, and what became of all that were read."""

    by_template: dict[str, list[EvalRecord]]  # the key of a template → its records, in the same order for all
    account: Account
    data_hash: str
    notes: tuple[str, ...]  # about the sources


def read_for_models(settings: EvaluateSettings, candidates: Candidates, to_read: ToRead) -> ReadRecords:
    """The records that every model's template can write. Raises BadData where there are none.

    Raises BadSettings if one of them is longer than the base has positions for.
    """
    read = _read_with_each_template(settings, candidates, to_read)
    first, *others = read.records.values()
    common = [key for key in first if all(key in records for records in others)]
    account = account_of(
        read.ledgers,
        [origin for _, origin in common],
        wanted=to_read.wanted,
        max_tokens=candidates.max_seq_length,
        sources=to_read.sources,
    )
    _refuse_none(account, to_read.sources)
    keys = _chosen(common, settings)
    if len(keys) < len(common):
        account = replace(account, chosen=len(keys))
    by_template = {template_key: [records[key] for key in keys] for template_key, records in read.records.items()}
    longest = 0
    for records in by_template.values():
        for example in chain.from_iterable(record.examples for record in records):
            longest = max(longest, len(example.ids))
    config = read_config(candidates.base_path, trust_remote_code=settings.trust_remote_code)
    refuse_too_few_positions(config, longest)
    return ReadRecords(by_template, account, read.data_hash, tuple(read.notes))


@dataclass
class _ReadWithTemplates:
    """The records of the same sources as each template writes them.

    records   the key of a template → the records that it can write
    ledgers   names of the models with one template → what became of the records with it
    notes     about the sources; each once, although every template reads the same ones
    """

    records: dict[str, dict[Key, EvalRecord]] = field(default_factory=dict)
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    data_hash: str = ""


def _read_with_each_template(settings: EvaluateSettings, candidates: Candidates, to_read: ToRead) -> _ReadWithTemplates:
    """Read the sources once per template. Raises BadData if they have changed since the run, or if none can be used."""
    max_tokens = candidates.max_seq_length
    reading = replace(to_read.reading, max_seq_length=max_tokens, overlength="shorten", skip_overlength=False)
    rules = Rules(**reading.rules())
    templates: dict[str, Template] = {subject.template.key: subject.template for subject in candidates.subjects}
    read = _ReadWithTemplates()
    for template_key, template in templates.items():
        read.records[template_key], data = read_records(to_read.sources, template, rules, to_read.wanted)
        if to_read.wanted is not None:
            refuse_changed_files(Path(settings.adapter_path[0]), data.data_hash)
        refuse_unusable(data.ledger, to_read.sources)
        models = [subject.name for subject in candidates.subjects if subject.template.key == template_key]
        read.ledgers[", ".join(models)] = data.ledger
        read.notes |= dict.fromkeys(data.notes)
        read.data_hash = data.data_hash
    return read


def _refuse_none(account: Account, sources: Sequence[str]) -> None:
    """Raise BadData if there is no record that every template can write."""
    named = ", ".join(sources)
    if account.used:
        return
    if account.refused:
        none = f"{named}: no record can be written with the templates of all models."
        raise BadData("\n".join([listed_refusals(account.refused), none]))
    raise BadData(
        f"{named}: none of the records that the run held out are here. Pass --dataset_path with records to evaluate on."
    )


def _chosen(keys: list[Key], settings: EvaluateSettings) -> list[Key]:
    """As many of the records as --records allows, chosen at random."""
    if not settings.records or len(keys) <= settings.records:
        return keys
    return [keys[row] for row in sample_rows(len(keys), settings.records, seed=settings.seed)]


def say_what_was_read(read: ReadRecords, folders: Sequence[str], console: Console) -> None:
    """Say how many records are used, which are not and why, and which of them the adapters have learned."""
    console.say(read.account.summary())
    for note in (*read.notes, *read.account.notes()):
        console.notice(note)
    records = next(iter(read.by_template.values()))
    _say_learned(folders, read.data_hash, [record.origin for record in records], console.notice)


def _say_learned(folders: Sequence[str], data_hash: str, origins: Sequence[str], notice: Callable[[str], None]) -> None:
    """Say how many of these records an adapter was trained on: its figures say nothing about new records.

    data_hash  of the files of these records; of a run on other files nothing is known
    """
    for folder in folders:
        run = run_records(Path(folder))
        if run is not None and run.data_hash == data_hash:
            learned = sum(origin not in run.held_out for origin in origins)
            if learned:
                notice(
                    f"{folder} was trained on {learned:,} of these {len(origins):,} records. Its figures show how well "
                    "they were learned, not how well new ones are answered."
                )
        elif run is not None and run.eval_hash == data_hash:
            names = {name for origin in run.like_trained_ones for name in _names_of(origin)}
            if alike := len(names.intersection(origins)):
                notice(
                    f"{folder} was trained on records that are nearly the same as {alike:,} of these {len(origins):,}. "
                    "Its figures show how well they were learned, not how well new ones are answered."
                )


def _names_of(origin: str) -> list[str]:
    """`test/data.jsonl:7`, `data.jsonl:7`: a run's origin has more of the path if another file has the same name."""
    parts = origin.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]
