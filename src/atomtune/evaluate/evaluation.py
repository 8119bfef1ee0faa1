"""Evaluation: every model on every record, batch by batch, so that all models have done the same records."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from atomtune.batch.collate import Collator
from atomtune.console import Console, progress_bar
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.reply import read_reply
from atomtune.durations import rough_duration
from atomtune.evaluate.answers import chrf, exactly_equal, thinks
from atomtune.evaluate.likelihood import TargetScores, score_targets
from atomtune.evaluate.metrics import AnswerResult, RecordResult, Score
from atomtune.evaluate.models import Models, Subject
from atomtune.evaluate.questions import EvalRecord, Question, answer_text
from atomtune.evaluate.tool_calls import ToolCalls, calls_of
from atomtune.language import translated
from atomtune.model.causal_lm import CausalLM
from atomtune.model.generate import stop_ids
from atomtune.model.greedy_batch import Generated, generate_answers
from atomtune.model.load import pad_id_of


@dataclass
class Evaluation:
    """What was done: each model's results for the records, the scores of the forgetting probe, and those of lm-eval."""

    records: list[EvalRecord]  # as the first model's template writes them
    results: dict[str, list[RecordResult]]  # model → one result per record
    probe: dict[str, list[TargetScores]] = field(default_factory=dict)
    lm_eval: dict[str, dict[str, Score]] = field(default_factory=dict)  # model → task and metric → score
    stopped_early: bool = False


@dataclass(frozen=True)
class EvaluationOptions:
    """How the records are evaluated.

    generate  whether the models also answer; if not, only likelihoods are computed
    seed      for the order of the batches
    """

    batch_size: int
    max_new_tokens: int
    generate: bool
    seed: int


def evaluate_records(
    models: Models,
    records_by_template: dict[str, list[EvalRecord]],
    collator: Collator,
    options: EvaluationOptions,
    console: Console,
) -> Evaluation:
    """Evaluate every model on the records; Ctrl-C ends it and keeps the batches that all models have done.

    records_by_template  the key of each template → the records as it writes them, in the same order
    """
    first = records_by_template[models.subjects[0].template.key]
    batches = _batches(first, options)
    done = Evaluation([], {subject.name: [] for subject in models.subjects})
    clock = _Clock(console, shares=len(models.subjects) * len(first) / len(batches[0]), stops=len(batches) > 1)
    with progress_bar(console) as progress:
        task = progress.add_task(translated(f"{len(models.subjects)} models"), total=len(first))
        for rows in batches:
            try:
                batch = _batch_of_all_models(models, records_by_template, rows, collator, options, tell=clock.tell)
            except KeyboardInterrupt:
                done.stopped_early = True
                break
            done.records += [first[row] for row in rows]
            for name, results in batch.items():
                done.results[name] += results
            progress.advance(task, len(rows))
    return done


class _Clock:
    """Says how long the evaluation takes, once one model has done its first batch, which has the longest records.

    shares  all the work, in units of that one batch of one model
    stops   whether Ctrl-C before the end keeps anything
    """

    def __init__(self, console: Console, *, shares: float, stops: bool) -> None:
        self.console, self.shares, self.stops = console, shares, stops
        self.began, self.has_announced = time.monotonic(), False

    def tell(self) -> None:
        if self.has_announced:
            return
        self.has_announced = True
        left = rough_duration((time.monotonic() - self.began) * (self.shares - 1))
        if self.stops:
            self.console.say(f"About {left} for these records. Ctrl-C ends it early and keeps what is done.")
        else:
            self.console.say(f"About {left} for these records.")


def _batch_of_all_models(
    models: Models,
    records_by_template: dict[str, list[EvalRecord]],
    rows: Sequence[int],
    collator: Collator,
    options: EvaluationOptions,
    *,
    tell: Callable[[], None],
) -> dict[str, list[RecordResult]]:
    """Every model's results for these rows; all or none are kept, so that all figures are over the same records.

    tell  called when a model has done the batch
    """
    batch: dict[str, list[RecordResult]] = {}
    for subject in models.subjects:
        written = records_by_template[subject.template.key]
        records = [written[row] for row in rows]
        batch[subject.name] = _batch_results(models, subject, records, collator, options)
        tell()
    return batch


def _batches(records: Sequence[EvalRecord], options: EvaluationOptions) -> list[list[int]]:
    """Rows in batches of similar length. The longest come first, so that too little memory shows at once.

    The other batches are shuffled, so that after Ctrl-C the finished ones are a fair sample of all records.
    """
    longest = [max(len(example.ids) for example in record.examples) for record in records]
    order = sorted(range(len(records)), key=lambda row: -longest[row])
    first, *others = (order[start : start + options.batch_size] for start in range(0, len(order), options.batch_size))
    random.Random(options.seed).shuffle(others)
    return [first, *others]


def _batch_results(
    models: Models, subject: Subject, records: Sequence[EvalRecord], collator: Collator, options: EvaluationOptions
) -> list[RecordResult]:
    """One model's results for some records."""
    examples = [record.examples for record in records]
    questions = [question for record in records for question in record.questions]
    generated: list[Generated] = []
    with models.answering_as(subject) as model:
        scores = score_targets(model, examples, collator)
        if options.generate:
            generated = _answers_to(model, questions, subject.template, options)
    # The answers are in the order of the questions: first those of the first record.
    answers = iter(generated)
    results: list[RecordResult] = []
    for record, score in zip(records, scores, strict=True):
        record_answers: list[AnswerResult] = []
        if options.generate:
            for question in record.questions:
                record_answers.append(_compared(next(answers), question, record.tools, subject.template))
        results.append(RecordResult(score, tuple(record_answers)))
    return results


def _answers_to(
    model: CausalLM, questions: Sequence[Question], template: Template, options: EvaluationOptions
) -> list[Generated]:
    generated: list[Generated] = []
    for start in range(0, len(questions), options.batch_size):
        batch = questions[start : start + options.batch_size]
        generated += generate_answers(
            model,
            [question.prompt_ids for question in batch],
            stop_ids=stop_ids(model, template),
            pad_id=pad_id_of(template.tokenizer),
            max_new_tokens=options.max_new_tokens,
        )
    return generated


def _compared(answer: Generated, question: Question, tools: frozenset[str], template: Template) -> AnswerResult:
    """A generated answer, compared with its reference."""
    text = answer_text(answer.ids, template.tokenizer, stopped=answer.stopped)
    calls: tuple[bool, bool] | None = None
    if tools and _calls(question.reference_ids, question, tools, template).parsed:
        answer_calls = _calls(answer.ids, question, tools, template)
        calls = (answer_calls.parsed > 0, answer_calls.known > 0)
    return AnswerResult(
        text=text,
        chrf=chrf(text, question.reference),
        exact=exactly_equal(text, question.reference),
        stopped=answer.stopped,
        tokens=len(answer.ids),
        reference_tokens=len(question.reference_ids) - 1,  # without the stop token; the answer has none either
        thinks=thinks(text, question.prompt),
        calls=calls,
    )


def _calls(ids: Sequence[int], question: Question, tools: frozenset[str], template: Template) -> ToolCalls:
    return calls_of(answer_text(ids, template.tokenizer), read_reply(template, question.prompt, ids), tools)
