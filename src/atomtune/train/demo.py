"""Demo: the answers to its held-out prompts before and after training."""

import json
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from atomtune.console import Console
from atomtune.data.encoding.chat_template import Template
from atomtune.data.records import Turn
from atomtune.model.generate import answer
from atomtune.settings.fields import TrainSettings
from atomtune.settings.read import DEMO_FOLDER
from atomtune.train.random_state import random_state_kept

LONGEST_ANSWER = 60  # tokens; the demo's answers are one or two sentences


@dataclass
class Samples:
    """Prompts and their answers; none outside the demo."""

    model: Any
    template: Template
    turns: list[Turn] = field(default_factory=list)
    before: list[str] = field(default_factory=list)

    @classmethod
    def of_demo(cls, settings: TrainSettings, model: Any, template: Template) -> "Samples":
        """The demo's held-out prompts, answered by the base."""
        samples = cls(model, template)
        if settings.demo:
            lines = (DEMO_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines if line.strip()]
            samples.turns = [Turn("user", record["instruction"], record["input"]) for record in records]
            with random_state_kept(), model.disable_adapter():  # a resumed run's adapter is half trained already
                samples.before = samples._answers()
        return samples

    def _answers(self) -> list[str]:
        answers = []
        for turn in self.turns:
            messages = self.template.messages([turn])
            answers.append(answer(self.model, self.template, messages, max_new_tokens=LONGEST_ANSWER))
        return answers

    def show_after(self, console: Console) -> None:
        """A table of prompts and both answers."""
        if not self.turns:
            return
        table = Table(title="Three prompts that are not in the training data", show_lines=True)
        for heading in ("prompt", "before", "after"):
            table.add_column(heading, overflow="fold")
        for turn, before, after in zip(self.turns, self.before, self._answers(), strict=True):
            table.add_row("\n".join(filter(None, (turn.text, turn.input))), before, after)
        console.print(table)
