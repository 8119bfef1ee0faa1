"""Samples: a few prompts that the run does not train on, answered before and after, so that eyes can judge too.

The demo has prompts of its own; another run takes some of its held-out records. Training draws no random number for
them, and a model that cannot answer here costs a notice and not the run.
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

from atomtune.data.cache import as_examples
from atomtune.data.encoding.chat_template import Template
from atomtune.data.records import Record, Turn, learned_spans
from atomtune.language import translated
from atomtune.model.adapter import answering_as
from atomtune.model.generate import prompt_ids, stop_ids
from atomtune.model.greedy_batch import generate_answers
from atomtune.model.load import pad_id_of
from atomtune.settings.read import DEMO_FOLDER
from atomtune.train.dataset import Data, records_of_rows
from atomtune.train.random_state import random_state_kept
from atomtune.train.run_context import RunContext

#: How many prompts, the longest answer and prompt in tokens, and for how many seconds they are answered.
SAMPLES, LONGEST_ANSWER, LONGEST_PROMPT, SECONDS = 3, 60, 1000, 30.0
#: Records that are looked through for prompts that are not too long.
_TRIED = 20
#: What a model that cannot generate as it stands raises: no cache, a missing kernel, no memory left.
_CANNOT = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)
#: Characters of a text on the screen; report.html and run.json have all of it.
_SHOWN = 400
#: One piece of 2 to 40 characters, five times or more without anything between.
_LOOP = re.compile(r"(.{2,40}?)\1{4,}", re.DOTALL)


@dataclass(frozen=True)
class Sample:
    """A prompt with its answers; text as a person reads it.

    endless  whether the tuned model's answer had no end within LONGEST_ANSWER tokens
    """

    prompt: str
    reference: str
    before: str = ""
    after: str = ""
    endless: bool = False

    @property
    def is_broken(self) -> bool:
        """Whether the tuned model's answer is nothing that a person would send: by its form, not by what it says."""
        runs_on = self.endless and 0 < 2 * len(self.reference) < len(self.after)
        loops = _loops(self.after) and not _loops(self.reference)
        return runs_on or loops or (not self.after and bool(self.reference))


@dataclass
class Samples:
    """The prompts of a run; none where there is nothing to ask."""

    run: RunContext
    model: Any
    template: Template
    prompts: list[list[int]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @classmethod
    def of_run(cls, run: RunContext, model: Any, template: Template, data: Data) -> "Samples":
        """The prompts, answered by the base. A resumed run's adapter is half trained already, so it is switched off."""
        samples = cls(run, model, template)
        sharded = run.args.fsdp or run.args.deepspeed  # there no rank can answer alone
        if run.args.process_index or sharded:
            return samples
        if run.settings.demo:
            samples._take_demo()
        elif data.evaluate is not None:
            samples._take_held_out(data.evaluate, shared_instruction=data.ledger.shared_instruction)
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

    def _take_held_out(self, evaluate: datasets.Dataset, *, shared_instruction: str | None) -> None:
        """The last answers of some records, each with what the user had said in the record: no template's words."""
        draw = random.Random(self.run.args.seed)
        rows = draw.sample(range(len(evaluate)), min(_TRIED, len(evaluate)))
        records = records_of_rows(self.run, evaluate.select(sorted(rows)))
        tokenizer = self.template.tokenizer
        for row in rows:
            example = as_examples(evaluate[row])[-1]
            spans, question = learned_spans(example), _question(records.get(evaluate[row]["origin"]))
            if len(self.samples) < SAMPLES and question and spans and 0 < spans[-1][0] <= LONGEST_PROMPT:
                start, end = spans[-1]
                self.prompts.append(list(example.ids[:start]))
                reference = tokenizer.decode(list(example.ids[start:end]), skip_special_tokens=True).strip()
                self.samples.append(Sample(_text_of(question, without=shared_instruction), reference))

    def _answers(self) -> list[tuple[str, bool]]:
        """One for each prompt and whether it is endless; fewer where the time is over or the model cannot answer.

        An answer that the time cuts short says little of the model: it is left out where there is another.
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
        # At the limit a character may be cut in two.
        endless = not generated.stopped and len(generated.ids) == LONGEST_ANSWER
        return text if generated.stopped else text.rstrip("\ufffd") + " …", endless

    def answer_after(self) -> list[Sample]:
        """The samples with the tuned model's answers; those that have both."""
        if not self.samples:
            return []
        with random_state_kept():
            after = self._answers()
        return [
            replace(sample, after=text, endless=endless)
            for sample, (text, endless) in zip(self.samples, after, strict=False)
        ]


def _question(record: Record | None) -> Turn | None:
    """What the last learned answer of a record answers."""
    if record is None or not record.learned:
        return None
    asked_before = [turn for turn in record.turns[: record.learned[-1]] if turn.role in ("user", "tool")]
    return asked_before[-1] if asked_before else None


def _text_of(turn: Turn, *, without: str | None = None) -> str:
    """Instruction and input as the record has them; an instruction that nearly all records share is left out."""
    instruction = "" if turn.text == without and turn.input else turn.text
    return "\n".join(filter(None, (instruction, turn.input)))


def _loops(text: str) -> bool:
    """Whether a piece of it that holds a letter stands there again and again; lines and indentation are no loops."""
    return any(any(map(str.isalpha, match[1])) for match in _LOOP.finditer(text))


def all_as_before(samples: Sequence[Sample]) -> bool:
    """Whether training changed no answer, and none was right before."""
    return bool(samples) and all(sample.after == sample.before != sample.reference for sample in samples)


def table_of(samples: Sequence[Sample], *, title: str) -> Table:
    """Prompts, references where they are known, and both answers, one below the other: readable at any width."""
    table = Table(
        title=translated(title), title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
    )
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
