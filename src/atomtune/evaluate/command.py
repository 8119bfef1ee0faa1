"""Evaluate: base against tuned, on a file or on the records that a run held out."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.table import Table

from atomtune.batch.collate import Collator
from atomtune.batch.cost import sample_rows
from atomtune.choices import Layout
from atomtune.console import Console, as_command
from atomtune.data.cache import Rules, as_examples
from atomtune.data.encoding.chat_template import Template
from atomtune.data.ledger import Ledger, listed_refusals, refuse_unusable
from atomtune.disk import read_json_object, sha256_of, why_unwritable, write_json, write_text
from atomtune.errors import BadData, BadSettings, RunFailed, Stopped
from atomtune.evaluate.account import Account, account_of
from atomtune.evaluate.evaluation import Evaluation, EvaluationOptions, evaluate_records
from atomtune.evaluate.html_page import page
from atomtune.evaluate.models import Candidates, Models, candidates_of, load_models
from atomtune.evaluate.probe import probe_prompts, probe_scores
from atomtune.evaluate.questions import EvalRecord, Key, read_records
from atomtune.evaluate.report import Report, make_report, markdown, metric_text, score_text, used_metrics
from atomtune.evaluate.run_folder import RunRecords, refuse_changed_files, run_file, run_records
from atomtune.extras import refuse_missing_packages
from atomtune.language import message, translated
from atomtune.model.adapter_folder import CONFIG, adapter_file, refuse_empty_folder
from atomtune.model.base_shape import refuse_too_few_positions
from atomtune.model.layout_support import collator_for, why_padded
from atomtune.model.load import pad_id_of, quiet_libraries, read_config
from atomtune.settings.command_settings import EvaluateSettings
from atomtune.settings.run_settings import RecordSettings
from atomtune.settings.spelled import base_words

#: A terminal of this many columns or more always gets a table.
NARROWEST_FOR_TABLES = 80

#: Bytes that have to be free for the reports, which have about 20,000.
_ROOM_FOR_REPORTS = 2**20
#: Settings that change no figure, or only through what the report has anyway: base, adapters, data, records.
_NOT_COMPARED = {
    *("adapter_path", "model_path", "dataset_path", "records", "output_dir", "per_device_eval_batch_size"),
    *("device_map", "trust_remote_code", "other_base"),
}
#: Keys of report.json that are equal if one evaluation repeats another.
_IDENTITY = ("base", "adapters", "data", "data_sha256", "held_out", "records", "stopped_early", "settings")

_PROBE_MISSING = message(", without the forgetting probe")
_TASKS_MISSING = message(", without all scores of lm-eval")
_BOTH_MISSING = message(", without the forgetting probe and lm-eval")


def evaluate(settings: EvaluateSettings) -> int:
    """Run `atomtune evaluate`. Raises Stopped (exit code 75) after Ctrl-C, with the report of what was done."""
    console = Console()
    folder = output_folder(settings)
    _refuse_impossible(settings)  # before the folder: the reports go into the adapter's
    refuse_unwritable(folder)
    report = measure(settings, console)
    if settings.output_dir is None:
        folder = beside_others(folder, report)
    say_report(report, console)
    write_reports(report, folder)
    console.say(f"\nreport.html, report.md and report.json are in {folder}.")
    if report.stopped_early:
        missing = _missing_in(report, settings)
        raise Stopped(
            f"stopped early: the report covers the {report.records:,} records that all models have answered{missing}."
        )
    if settings.adapter_path:
        adapter = ["--adapter_path", settings.adapter_path[0], *base_words(settings)]
        commands = ["chat", *adapter, "--compare"], ["certify", *adapter]
        console.next_steps(map(as_command, commands))
    return 0


def _missing_in(report: Report, settings: EvaluateSettings) -> str:
    """What a report lacks besides records because of Ctrl-C, as the end of a sentence."""
    lacks_probe = bool(settings.adapter_path) and not settings.no_probe and not report.has_probe
    lacks_scores = bool(settings.lm_eval_tasks) and len(report.lm_eval) < len(report.models)
    if lacks_probe and lacks_scores:
        return _BOTH_MISSING
    if lacks_scores:
        return _TASKS_MISSING
    return _PROBE_MISSING if lacks_probe else ""


def output_folder(settings: EvaluateSettings) -> Path:
    """The folder for the reports."""
    if settings.output_dir:
        return Path(settings.output_dir)
    return Path(settings.adapter_path[0]) / "evaluation" if settings.adapter_path else Path("evaluation")


def beside_others(folder: Path, report: Report) -> Path:
    """The first of evaluation, evaluation-1, … without the report of an evaluation that this one does not repeat.

    An evaluation takes hours: one of other records, models or settings does not replace it, unless --output_dir says
    so. Nor is a report of an older version replaced, which does not say what it was made from.
    """
    own = report.to_json()
    place, number = folder, 0
    while True:
        try:
            before = read_json_object(place / "report.json")
        except (OSError, ValueError):  # no report, or a broken one
            return place
        if all(before.get(key) == own[key] for key in _IDENTITY):
            return place
        number += 1
        place = folder.with_name(f"{folder.name}-{number}")


def refuse_unwritable(folder: Path) -> None:
    """Raise BadSettings if the reports cannot be written; else that would show only after all answers are generated."""
    if why := why_unwritable(folder, n_bytes=_ROOM_FOR_REPORTS):
        raise BadSettings([f"--output_dir {folder} cannot be written: {why}. Pass another one."])


def measure(settings: EvaluateSettings, console: Console) -> Report:
    """Load the models, evaluate them on the records, and compute the figures.

    Raises BadSettings if no records are named or held out, Stopped if Ctrl-C comes before the first batch is done.
    """
    _refuse_impossible(settings)
    _refuse_missing_packages(settings)
    quiet_libraries()
    to_read = _what_to_read(settings)
    score_tasks = _lm_eval(settings) if settings.lm_eval_tasks else None
    candidates = candidates_of(settings, console)
    read = _read(settings, candidates, to_read)
    _say_what_was_read(read, settings.adapter_path, console)
    made_from = _made_from(settings, candidates, read)
    # Loaded last: a wrong file is found at once, and a large base takes minutes.
    models = load_models(settings, candidates, console)
    _say_what_is_evaluated(models, read.by_template, to_read.sources, console)
    collator = _collator(models)
    done = _evaluated(settings, models, read.by_template, collator, console)
    if not done.stopped_early:
        _add_probe_and_tasks(done, settings, models, collator, console, score_tasks=score_tasks)
    return make_report(
        done,
        base_path=str(models.base_path),
        sources=[Path(source).name for source in to_read.sources],
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        account=read.account,
        made_from=made_from,
    )


def _made_from(settings: EvaluateSettings, candidates: Candidates, read: "ReadRecords") -> dict[str, Any]:
    """What the figures depend on besides base and files: the bytes of data and adapters, and the settings."""
    names = [subject.name for subject in candidates.subjects if subject.adapter is not None]
    adapters: dict[str, str | None] = {}
    for name, folder in zip(names, candidates.folders, strict=True):
        weights = adapter_file(folder)
        adapters[name] = sha256_of(weights) if weights else None
    return {
        "adapters": adapters,
        "data_sha256": read.data_hash,
        "held_out": read.account.held_out,
        "settings": {name: value for name, value in asdict(settings).items() if name not in _NOT_COMPARED},
    }


def _refuse_missing_packages(settings: EvaluateSettings) -> None:
    """Raise BadSettings if a package is not installed, before anything is loaded."""
    if not settings.no_generate:
        refuse_missing_packages(
            ["sacrebleu"], extra="evaluate", what="Comparing generated answers", otherwise="--no_generate"
        )
    if settings.lm_eval_tasks:
        refuse_missing_packages(["lm_eval"], extra="lm-eval", what="--lm_eval_tasks")


def _lm_eval(settings: EvaluateSettings) -> Callable[..., None]:
    """The function that scores the models in lm-eval's tasks; the tasks are loaded here, before any model is."""
    from atomtune.evaluate.lm_eval_tasks import load_tasks, score_tasks

    tasks = load_tasks(settings.lm_eval_tasks, limit=settings.lm_eval_limit)
    return partial(score_tasks, tasks=tasks, batch_size=settings.per_device_eval_batch_size)


def _say_what_is_evaluated(
    models: Models, records_by_template: Mapping[str, list[EvalRecord]], sources: Sequence[str], console: Console
) -> None:
    records = next(iter(records_by_template.values()))
    answers = sum(len(record.questions) for record in records)
    subjects = ", ".join(subject.name for subject in models.subjects)
    console.say(f"{len(records):,} records with {answers:,} answers of {', '.join(sources)}; models: {subjects}.")


def _evaluated(
    settings: EvaluateSettings,
    models: Models,
    records_by_template: dict[str, list[EvalRecord]],
    collator: Collator,
    console: Console,
) -> Evaluation:
    """Every model's results for the records. Raises Stopped if no record was done before Ctrl-C."""
    options = EvaluationOptions(
        batch_size=settings.per_device_eval_batch_size,
        max_new_tokens=settings.max_new_tokens,
        generate=not settings.no_generate,
        seed=settings.seed,
    )
    done = evaluate_records(models, records_by_template, collator, options, console)
    if not done.records:
        raise Stopped("stopped before the first records were done; nothing is written.")
    if options.generate:
        _say_unread_calls(done, console.notice)
    return done


def _add_probe_and_tasks(
    done: Evaluation,
    settings: EvaluateSettings,
    models: Models,
    collator: Collator,
    console: Console,
    *,
    score_tasks: Callable[..., None] | None,
) -> None:
    """Add the forgetting probe's scores and lm-eval's; Ctrl-C ends it, and what is done stays."""
    try:
        if not settings.no_probe and len(models.subjects) > 1:
            done.probe = probe_scores(
                models,
                collator,
                console,
                prompts=probe_prompts(),
                batch_size=settings.per_device_eval_batch_size,
            )
        if score_tasks is not None:
            score_tasks(models, scores=done.lm_eval, console=console)
    except KeyboardInterrupt:
        done.stopped_early = True


def _refuse_impossible(settings: EvaluateSettings) -> None:
    """Raise BadSettings if no model or no records are named, or a flag has no effect; BadModel without an adapter."""
    problems: list[str] = []
    if not settings.adapter_path and not settings.model_path:
        problems.append("--adapter_path is missing: the run's output folder. --model_path alone evaluates a base.")
    if not settings.adapter_path and not settings.dataset_path:
        problems.append("--dataset_path is missing: records to evaluate on.")
    if settings.adapter_path and (settings.template != "auto" or settings.chat_template_kwargs):
        problems.append(
            "--template and --chat_template_kwargs are for a base without an adapter. Leave them out: an adapter is "
            "evaluated with the template and the variables of its training."
        )
    if not settings.dataset_path and (settings.format != "auto" or settings.keys or settings.roles):
        problems.append(
            "--format, --keys and --roles are used with --dataset_path only. Leave them out: the held-out records are "
            "read as in training."
        )
    if problems:
        raise BadSettings(problems)
    for folder in map(Path, settings.adapter_path):
        refuse_empty_folder(folder)
        if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
            raise BadSettings([f"--adapter_path {folder} is a whole model, not an adapter. Pass it with --model_path."])


@dataclass(frozen=True)
class ToRead:
    """Which records are read, and how."""

    sources: list[str]
    reading: RecordSettings
    wanted: frozenset[str] | None  # origins, for example "train.jsonl:17"; None: all records


def _what_to_read(settings: EvaluateSettings) -> ToRead:
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


def _read(settings: EvaluateSettings, candidates: Candidates, to_read: ToRead) -> ReadRecords:
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


def _say_what_was_read(read: ReadRecords, folders: Sequence[str], console: Console) -> None:
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


def _say_unread_calls(done: Evaluation, notice: Callable[[str], None]) -> None:
    """Say if no tool call in the references can be read: these figures are missing, not zero."""
    first = next(iter(done.results.values()))
    are_read = any(answer.calls is not None for result in first for answer in result.answers)
    if not are_read and (count := sum(record.calls and bool(record.tools) for record in done.records)):
        notice(
            f"evaluate does not know the format of the tool calls in {count:,} records, so their figures are missing."
        )


def _collator(models: Models) -> Collator:
    """Shared beginnings are computed once if this model computes them exactly so, else rows are padded."""
    layout: Layout = "tree" if why_padded(models.model) is None else "padded"
    tokenizer = models.subjects[0].template.tokenizer
    return collator_for(models.model, layout, pad_id=pad_id_of(tokenizer), as_examples=as_examples)


def say_report(report: Report, console: Console) -> None:
    """The figures, and what they say."""
    title = f"{report.records:,} records; the 95 % interval in brackets"
    if report.records == 1:
        title = "1 record: no interval can be given"
    names = list(report.models)
    rows = _rows(report)
    if _has_room(names, rows, console.width):
        console.print(_table(translated(title), names, rows))
    else:
        console.say(title)
        for heading, figures in rows:
            console.say(heading)
            console.columns(list(zip(names, figures, strict=True)))
    for sentence in report.sentences(translated):
        console.say(sentence)


def _rows(report: Report) -> list[tuple[str, list[str]]]:
    """What was measured, in the language that is spoken, and the figure of each model; a dash where it has none."""
    rows: list[tuple[str, list[str]]] = []
    for metric in used_metrics(report):
        rows.append((translated(metric.title), [metric_text(report, model, metric) for model in report.models]))
    for name in report.lm_eval_names:
        heading = translated(f"lm-eval {name} (± standard error)")
        rows.append((heading, [score_text(report, model, name) for model in report.models]))
    return rows


def _has_room(names: Sequence[str], rows: Sequence[tuple[str, list[str]]], width: int) -> bool:
    """Whether a terminal has room for a table whose figures are on one line each; one of 80 columns always gets one.

    rich makes the column of headings as narrow as the widest column of figures before it breaks a figure in two.
    """
    if width >= NARROWEST_FOR_TABLES:
        return True
    headings = max(cell_len(heading) for heading, _ in rows)
    figures = [max(map(cell_len, column)) for column in zip(names, *(cells for _, cells in rows), strict=True)]
    lines = 3 * (1 + len(names)) + 1  # between the columns, with a space on both sides
    return min(headings, max(figures)) + sum(figures) + lines <= width


def _table(title: str, names: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")  # Chinese has no spaces, and rich cuts what is longer than its column
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for heading, figures in rows:
        table.add_row(heading, *figures)
    return table


def write_reports(report: Report, folder: Path) -> None:
    """report.json, report.md and report.html.

    Raises RunFailed if they cannot be written. They are then in a temporary folder, because an evaluation takes hours.
    """
    try:
        _write_reports(report, folder)
    except OSError as error:
        kept = Path(tempfile.mkdtemp(prefix="atomtune-reports-"))
        _write_reports(report, kept)
        raise RunFailed(
            f"--output_dir {folder}: the reports cannot be written there: {error.strerror}. They are in {kept} instead."
        ) from None


def _write_reports(report: Report, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", report.to_json())
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "report.html", page(report))
