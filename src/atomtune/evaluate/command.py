"""Evaluate: base against tuned, on a file or on the records that a run held out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from atomtune.batch.collate import Collator
from atomtune.choices import Layout
from atomtune.console import Console, as_command
from atomtune.data.example_table import as_examples
from atomtune.disk import sha256_of
from atomtune.engines.served_folder import is_whole_model
from atomtune.errors import BadSettings, Stopped
from atomtune.evaluate.evaluation import Evaluation, EvaluationOptions, evaluate_records
from atomtune.evaluate.models import Candidates, Models, candidates_of, load_models
from atomtune.evaluate.probe import probe_prompts, probe_scores
from atomtune.evaluate.questions import EvalRecord
from atomtune.evaluate.records import ReadRecords, read_for_models, say_what_was_read, what_to_read
from atomtune.evaluate.report import Report, make_report
from atomtune.evaluate.report_files import beside_others, output_folder, refuse_unwritable, write_reports
from atomtune.evaluate.terminal import say_report
from atomtune.extras import refuse_missing_packages
from atomtune.language import message
from atomtune.model.adapter_folder import adapter_file, refuse_empty_folder
from atomtune.model.layout_support import collator_for, why_padded
from atomtune.model.load import pad_id_of, quiet_libraries
from atomtune.settings.command_settings import EvaluateSettings, TrainedModelSettings
from atomtune.settings.spelled import base_words

#: Settings that change no figure, or only through what the report has anyway: base, adapters, data, records.
_NOT_COMPARED = {
    *("adapter_path", "model_path", "dataset_path", "records", "output_dir", "per_device_eval_batch_size"),
    *("device_map", "trust_remote_code", "other_base"),
}

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
        console.next_steps(map(as_command, _next_commands(settings)))
    return 0


def _next_commands(settings: EvaluateSettings) -> list[list[str]]:
    """A chat with the first adapter on the base as it was evaluated, and a certificate that an engine serves it."""
    adapter = ["--adapter_path", settings.adapter_path[0]]
    as_evaluated = base_words(settings, TrainedModelSettings)
    return [["chat", *adapter, *as_evaluated, "--compare"], ["certify", *adapter, *base_words(settings)]]


def _missing_in(report: Report, settings: EvaluateSettings) -> str:
    """What a report lacks besides records because of Ctrl-C, as the end of a sentence."""
    lacks_probe = bool(settings.adapter_path) and not settings.no_probe and not report.has_probe
    lacks_scores = bool(settings.lm_eval_tasks) and len(report.lm_eval) < len(report.models)
    if lacks_probe and lacks_scores:
        return _BOTH_MISSING
    if lacks_scores:
        return _TASKS_MISSING
    return _PROBE_MISSING if lacks_probe else ""


def measure(settings: EvaluateSettings, console: Console) -> Report:
    """Load the models, evaluate them on the records, and compute the figures.

    Raises BadSettings if no records are named or held out, Stopped if Ctrl-C comes before the first batch is done.
    """
    _refuse_impossible(settings)
    _refuse_missing_packages(settings)
    quiet_libraries()
    to_read = what_to_read(settings)
    score_tasks = _lm_eval(settings) if settings.lm_eval_tasks else None
    candidates = candidates_of(settings, console)
    read = read_for_models(settings, candidates, to_read)
    say_what_was_read(read, settings.adapter_path, console)
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


def _made_from(settings: EvaluateSettings, candidates: Candidates, read: ReadRecords) -> dict[str, Any]:
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
        if is_whole_model(folder):
            raise BadSettings([f"--adapter_path {folder} is a whole model, not an adapter. Pass it with --model_path."])


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
