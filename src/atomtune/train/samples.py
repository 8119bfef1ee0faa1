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
from atomtune.data.records import Example, Turn
from atomtune.data.tokenizer import Tokenizer
from atomtune.evaluate.generation import generate_answers
from atomtune.evaluate.questions import learned_spans
from atomtune.model.generate import prompt_ids, stop_ids
from atomtune.model.load import pad_id_of
from atomtune.settings.read import DEMO_FOLDER
from atomtune.train.random_state import random_state_kept
from atomtune.train.run_context import RunContext

#: How many prompts, the longest answer and prompt in tokens, and after how many seconds no other one is begun.
SAMPLES, LONGEST_ANSWER, LONGEST_PROMPT, SECONDS = 3, 60, 1000, 10.0
#: Records that are looked through for prompts that are not too long.
_TRIED = 20
#: What a model that cannot generate as it stands raises: no cache, a missing kernel, no memory left.
_CANNOT = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)
#: In front of what a user says, where a template writes it as text.
_ROLE = re.compile(r"\s*(?:<\|?)?(user|human|question|instruction)(?:\|?>)?\s*(?:[:：\n]|$)\s*", re.IGNORECASE)
_ROLES = {"user", "human", "assistant", "model", "system", "tool", "ipython", "gpt"}


@dataclass(frozen=True)
class Sample:
    """A prompt with its answers; text as a person reads it."""

    prompt: str
    reference: str
    before: str = ""
    after: str = ""


@dataclass
class Samples:
    """The prompts of a run; none where there is nothing to ask."""

    run: RunContext
    model: Any
    template: Template
    prompts: list[list[int]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @classmethod
    def of_run(cls, run: RunContext, model: Any, template: Template, evaluate: datasets.Dataset | None) -> "Samples":
        """The prompts, answered by the base. A resumed run's adapter is half trained already, so it is switched off."""
        samples = cls(run, model, template)
        sharded = run.args.fsdp or run.args.deepspeed  # there no rank can answer alone
        if run.args.process_index or sharded:
            return samples
        if run.settings.demo:
            samples._take_demo()
        elif evaluate is not None:
            samples._take_held_out(evaluate, seed=run.args.seed)
        with random_state_kept(), model.disable_adapter():
            before = samples._answers()
        samples.samples = [replace(sample, before=text) for sample, text in zip(samples.samples, before, strict=False)]
        return samples

    def _take_demo(self) -> None:
        lines = (DEMO_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
        for record in [json.loads(line) for line in lines if line.strip()]:
            turn = Turn("user", record["instruction"], record["input"])
            self.prompts.append(prompt_ids(self.template, self.template.messages([turn])))
            prompt = "\n".join(filter(None, (turn.text, turn.input)))
            self.samples.append(Sample(prompt, record.get("output", "")))

    def _take_held_out(self, evaluate: datasets.Dataset, *, seed: int) -> None:
        rows = random.Random(seed).sample(range(len(evaluate)), min(_TRIED, len(evaluate)))
        for row in rows:
            example = as_examples(evaluate[row])[-1]
            spans = learned_spans(example)
            if len(self.samples) < SAMPLES and spans and 0 < spans[-1][0] <= LONGEST_PROMPT:
                start, end = spans[-1]
                self.prompts.append(list(example.ids[:start]))
                self.samples.append(_sample(example, start, end, self.template.tokenizer))

    def _answers(self) -> list[str]:
        """One for each prompt, or fewer where the time is over or the model cannot answer here."""
        answers: list[str] = []
        began = time.monotonic()
        was_training = self.model.training
        self.model.eval()
        try:
            for prompt in self.prompts:
                left = SECONDS - (time.monotonic() - began)
                if left <= 0:
                    break
                answers.append(self._answer(prompt, seconds=left))
        except _CANNOT as error:
            self.run.console.notice(f"no sample answers are shown; the model cannot write here: {error}")
        finally:
            self.model.train(was_training)
        return answers

    def _answer(self, prompt: Sequence[int], *, seconds: float) -> str:
        generated = generate_answers(
            self.model,
            [prompt],
            stop_ids=stop_ids(self.model, self.template),
            pad_id=pad_id_of(self.template.tokenizer),
            max_new_tokens=LONGEST_ANSWER,
            seconds=seconds,
        )[0]
        text = self.template.tokenizer.decode(list(generated.ids), skip_special_tokens=True).strip()
        return text if generated.stopped else f"{text} …"

    def answer_after(self) -> list[Sample]:
        """The samples with the tuned model's answers; those that have both."""
        if not any(sample.before for sample in self.samples):
            return []
        with random_state_kept():
            after = self._answers()
        return [replace(sample, after=text) for sample, text in zip(self.samples, after, strict=False)]


def _sample(example: Example, start: int, end: int, tokenizer: Tokenizer) -> Sample:
    """What was asked last in the prompt, and the reference answer."""
    reference = tokenizer.decode(list(example.ids[start:end]), skip_special_tokens=True).strip()
    return Sample(question_in(example.ids[:start], tokenizer), reference)


def question_in(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The last text in a prompt that is no role's name: control tokens stand around what a user says.

    <|im_start|>user⏎Who are you?<|im_end|>⏎<|im_start|>assistant⏎   →   Who are you?
    """
    control = set(tokenizer.all_special_ids)
    parts: list[list[int]] = [[]]
    for token in ids:
        if token in control:
            parts.append([])
        else:
            parts[-1].append(token)
    texts = [tokenizer.decode(part).strip() for part in parts]
    prompts = [text for text in texts if text and text.rstrip(":：").lower() not in _ROLES]
    return _ROLE.sub("", prompts[-1], count=1) if prompts else ""


def table_of(samples: Sequence[Sample], *, title: str) -> Table:
    """Prompts, references where they are known, and both answers."""
    table = Table(title=title, show_lines=True)
    with_references = any(sample.reference for sample in samples)
    for heading in ("prompt", *(["reference"] if with_references else []), "before", "after"):
        table.add_column(heading, overflow="fold")
    for sample in samples:
        references = [sample.reference] if with_references else []
        table.add_row(sample.prompt, *references, sample.before, sample.after)
    return table


def to_run_json(samples: Sequence[Sample]) -> list[dict[str, str]]:
    return [asdict(sample) for sample in samples]
