"""Conversation: what was said so far, and the messages that the next question is sent with."""

import itertools
import json
from pathlib import Path

from atomtune.data.encoding.chat_template import Message
from atomtune.data.records import Turn
from atomtune.model.generate import prompt_ids
from atomtune.serve.tuned_model import ROOM_FOR_ANSWER, TunedModel, Wording


class Conversation:
    """Questions and answers under one system text; where the model's positions run out, the oldest are left out."""

    def __init__(self, tuned: TunedModel, system: str | None) -> None:
        self.tuned, self.system = tuned, system
        self._exchanges: list[list[Message]] = []

    @property
    def wording(self) -> Wording:
        return self.tuned.with_system(self.system)

    @property
    def messages(self) -> list[Message]:
        """All of it as it is sent."""
        return [*self.wording.opening, *itertools.chain(*self._exchanges)]

    def asking(self, question: str) -> list[Message]:
        """The messages that a question is sent with."""
        return [*self.messages, *self.wording.messages(question)]

    def make_room(self, question: str) -> int:
        """Forget the oldest exchanges until question and answer have room; how many were forgotten."""
        forgotten = 0
        while self._exchanges and self._tokens(question) + ROOM_FOR_ANSWER > self.tuned.positions:
            self._exchanges = self._exchanges[1:]
            forgotten += 1
        return forgotten

    def _tokens(self, question: str) -> int:
        return len(prompt_ids(self.tuned.template, self.asking(question)))

    def answered(self, question: str, turn: Turn) -> None:
        """Remember a question with its answer, thoughts and calls apart, as a client sends them back."""
        self._exchanges.append([*self.wording.messages(question), *self.tuned.template.messages([turn])])

    @property
    def has_exchanges(self) -> bool:
        return bool(self._exchanges)

    def begin_anew(self) -> None:
        """Forget all that was said; the system text stays."""
        self._exchanges = []

    def save(self, file: Path) -> None:
        """Append it to a file as one record of `messages`, as `train` reads them."""
        with file.open("a", encoding="utf-8") as records:
            records.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
