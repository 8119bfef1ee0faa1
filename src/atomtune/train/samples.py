"""Samples: a few prompts that the run does not train on, answered before and after training for the user to read.

The demo has its own prompts; other runs take some of their held-out records. Generating them does not change the random
numbers of training, and a model that cannot generate here gives a notice instead of ending the run.
"""

import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import datasets
from rich.table import Table

from atomtune.data.encoding.chat_template import Template
from atomtune.data.example_table import as_examples
from atomtune.data.records import Record, Turn, learned_spans
from atomtune.language import translated
from atomtune.model.adapter import answering_as
from atomtune.model.generate import prompt_ids, stop_ids
from atomtune.model.greedy_batch import generate_answers
from atomtune.model.load import pad_id_of
from atomtune.settings.read import DEMO_FOLDER
from atomtune.train.dataset import Data, evaluation_records
from atomtune.train.random_state import random_state_kept
from atomtune.train.ranks import is_sharded
from atomtune.train.run_context import RunContext
from atomtune.train.split import like_trained_ones

#: Number of prompts; most tokens of an answer and of a prompt; most seconds for all answers.
SAMPLES, LONGEST_ANSWER, LONGEST_PROMPT, SECONDS = 3, 60, 1000, 30.0
#: How many records are searched for prompts that are short enough.
_TRIED = 20
#: Errors of a model that cannot generate here: no cache, a missing kernel, not enough memory.
_CANNOT = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)
#: Most characters of a text in the terminal; report.html and run.json have the whole text.
_SHOWN = 400
#: A piece of 2 to 40 characters, repeated five times or more in a row.
_LOOP = re.compile(r"(.{2,40}?)\1{4,}", re.DOTALL)


@dataclass(frozen=True)
class Sample:
    """A prompt with its answers, as plain text.

    endless  whether the tuned model's answer did not end within LONGEST_ANSWER tokens
    """

    prompt: str
    reference: str
    before: str = ""
    after: str = ""
    endless: bool = False

    @property
    def is_broken(self) -> bool:
        """Whether the tuned model's answer is empty, repeats itself or runs on; judged by its form, not its content."""
        runs_on = self.endless and 0 < 2 * len(self.reference) < len(self.after)
        loops = _loops(self.after) and not _loops(self.reference)
        return runs_on or loops or (not self.after and bool(self.reference))


@dataclass
class Samples:
    """The prompts of a run with their answers; empty if there are no prompts."""

    run: RunContext
    model: Any
    template: Template
    prompts: list[list[int]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @classmethod
    def of_run(cls, run: RunContext, model: Any, template: Template, data: Data) -> "Samples":
        """Choose the prompts and let the base answer them. The adapter is disabled: a resumed run's is trained."""
        samples = cls(run, model, template)
        if run.args.process_index or is_sharded(run.args):
            return samples
        if run.settings.demo:
            samples._take_demo()
        elif data.evaluate is not None:
            samples._take_held_out(data, data.evaluate)
        with random_state_kept(), answering_as(model, None):
            before = samples._answers()
        samples.samples = [
            replace(sample, before=text) for sample, (text, _) in zip(samples.samples, before, strict=False)
        ]
        return samples

    def _take_demo(self) -> None:
        lines = (DEMO_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
        for record in [json.loads(line) for line in lines if line.strip()]:
            turn = Turn("user", record["instruction"], record["input"])
            self.prompts.append(prompt_ids(self.template, self.template.messages([turn])))
            self.samples.append(Sample(_text_of(turn), record.get("output", "")))

    def _take_held_out(self, data: Data, evaluate: datasets.Dataset) -> None:
        """Take the last answers of some records, each with the user's last text as it is in the record."""
        draw = random.Random(self.run.args.seed)
        learned = set(like_trained_ones(self.run))
        unseen = [row for row, origin in enumerate(evaluate["origin"][:]) if origin not in learned]
        rows = draw.sample(unseen, min(_TRIED, len(unseen)))
        records = evaluation_records(self.run, data, sorted(rows))
        tokenizer = self.template.tokenizer
        for row in rows:
            if len(self.samples) == SAMPLES:
                break
            example = as_examples(evaluate[row])[-1]
            spans, question = learned_spans(example), _question(records[row])
            if not question or not spans:
                continue
            start, end = spans[-1]  # of the last answer
            if not 0 < start <= LONGEST_PROMPT:
                continue
            self.prompts.append(list(example.ids[:start]))
            reference = tokenizer.decode(list(example.ids[start:end]), skip_special_tokens=True).strip()
            self.samples.append(Sample(_text_of(question, without=data.ledger.shared_instruction), reference))

    def _answers(self) -> list[tuple[str, bool]]:
        """(answer, is endless) for each prompt; fewer if the time is over or the model cannot generate.

        An answer that was cut off by the time limit says little about the model, so it is left out unless it is the
        only one.
        """
        answers: list[tuple[str, bool]] = []
        deadline = time.monotonic() + SECONDS
        was_training = self.model.training
        self.model.eval()
        try:
            for prompt in self.prompts:
                answer = self._answer(prompt, seconds=deadline - time.monotonic())
                is_late = time.monotonic() >= deadline
                if not (is_late and answers):
                    answers.append(answer)
                if is_late:
                    break
        except _CANNOT as error:
            self.run.console.notice(f"no sample answers are shown; the model could not generate here: {error}")
        finally:
            self.model.train(was_training)
        return answers

    def _answer(self, prompt: Sequence[int], *, seconds: float) -> tuple[str, bool]:
        generated = generate_answers(
            self.model,
            [prompt],
            stop_ids=stop_ids(self.model, self.template),
            pad_id=pad_id_of(self.template.tokenizer),
            max_new_tokens=LONGEST_ANSWER,
            seconds=seconds,
        )[0]
        text = self.template.tokenizer.decode(list(generated.ids), skip_special_tokens=True).strip()
        # At the limit, a character of several tokens may be cut in two.
        endless = not generated.stopped and len(generated.ids) == LONGEST_ANSWER
        return text if generated.stopped else text.rstrip("\ufffd") + " …", endless

    def answer_after(self) -> list[Sample]:
        """The samples with the tuned model's answers; samples that lack an answer are left out."""
        if not self.samples:
            return []
        with random_state_kept():
            after = self._answers()
        return [
            replace(sample, after=text, endless=endless)
            for sample, (text, endless) in zip(self.samples, after, strict=False)
        ]


def _question(record: Record) -> Turn | None:
    """The turn that the last learned answer of a record responds to."""
    if not record.learned:
        return None
    before = [turn for turn in record.turns[: record.learned[-1]] if turn.role in ("user", "tool")]
    return before[-1] if before else None


def _text_of(turn: Turn, *, without: str | None = None) -> str:
    """Instruction and input of a record. The instruction `without` is left out if there is an input."""
    instruction = "" if turn.text == without and turn.input else turn.text
    return "\n".join(filter(None, (instruction, turn.input)))


def _loops(text: str) -> bool:
    """Whether a piece that contains a letter is repeated in a row; rules and indentation do not count."""
    return any(any(map(str.isalpha, match[1])) for match in _LOOP.finditer(text))


def all_as_before(samples: Sequence[Sample]) -> bool:
    """Whether training changed no answer, and none of them was already right."""
    return bool(samples) and all(sample.after == sample.before != sample.reference for sample in samples)


def table_of(samples: Sequence[Sample]) -> Table:
    """Prompts, references if known, and both answers, one below another so that they are readable at any width."""
    title = translated("Prompts that are not in the training data")
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for number, sample in enumerate(samples):
        if number:
            table.add_row()
        table.add_row("  " + translated("prompt"), _beginning(sample.prompt))
        if sample.reference:
            table.add_row("  " + translated("reference"), _beginning(sample.reference))
        table.add_row("  " + translated("before"), _beginning(sample.before))
        table.add_row("  " + translated("after"), _beginning(sample.after), style="bold")
    return table


def _beginning(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"


def to_run_json(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    return [asdict(sample) for sample in samples]
