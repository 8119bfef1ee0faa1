"""Conversation: the questions and answers so far, and the messages for the next question."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from atomtune.data.encoding.chat_template import Message
from atomtune.model.generate import prompt_ids
from atomtune.serve.tuned_model import ROOM_FOR_ANSWER, Reply, TunedModel, Wording


class _Exchange(NamedTuple):
    """A question and its answer, as they are sent; whether the answer ended by itself."""

    messages: list[Message]
    is_complete: bool

    def record(self) -> list[Message]:
        """The messages as part of a record. An answer that was cut off would teach the model to stop there."""
        if self.is_complete:
            return self.messages
        return [*self.messages[:-1], {**self.messages[-1], "weight": 0}]


class Conversation:
    """Questions and answers under one system text. If they exceed the model's positions, the oldest are left out."""

    def __init__(self, tuned: TunedModel, system: str | None) -> None:
        self.tuned, self.system = tuned, system
        self._exchanges: list[_Exchange] = []

    @property
    def wording(self) -> Wording:
        return self.tuned.with_system(self.system)

    @property
    def messages(self) -> list[Message]:
        """All messages of the conversation, as they are sent."""
        return [*self.wording.opening, *_messages(self._exchanges)]

    def asking(self, question: str) -> list[Message]:
        """The messages to send for a question."""
        return self._asking(question, self._exchanges)

    def _asking(self, question: str, exchanges: Sequence[_Exchange]) -> list[Message]:
        return [*self.wording.opening, *_messages(exchanges), *self.wording.messages(question)]

    def make_room(self, question: str) -> int:
        """Forget the oldest exchanges until question and answer fit; returns how many were forgotten.

        For a question that does not fit even alone, and so is not answered, none are forgotten.
        """
        kept = self._exchanges
        while kept and self._tokens(question, kept) + ROOM_FOR_ANSWER > self.tuned.positions:
            kept = kept[1:]
        if not kept and self._tokens(question, kept) >= self.tuned.positions:
            return 0
        forgotten = len(self._exchanges) - len(kept)
        self._exchanges = kept
        return forgotten

    def _tokens(self, question: str, exchanges: Sequence[_Exchange]) -> int:
        return len(prompt_ids(self.tuned.template, self._asking(question, exchanges)))

    def remember(self, question: str, reply: Reply) -> None:
        """Remember a question and its answer, with thoughts and calls separated, as a client would send them back."""
        messages = [*self.wording.messages(question), *self.tuned.template.messages([reply.turn])]
        self._exchanges.append(_Exchange(messages, reply.is_complete))

    @property
    def has_exchanges(self) -> bool:
        return bool(self._exchanges)

    def begin_anew(self) -> None:
        """Forget all exchanges; the system text stays."""
        self._exchanges = []

    @property
    def cut_off(self) -> int:
        """How many answers did not end by themselves."""
        return sum(not exchange.is_complete for exchange in self._exchanges)

    def save(self, file: Path) -> None:
        """Append the conversation to a file, as one record of `messages` for `train`.

        Answers that were cut off get the weight 0: they are read, not learned.
        """
        exchanges = itertools.chain(*(exchange.record() for exchange in self._exchanges))
        record = {"messages": [*self.wording.opening, *exchanges]}
        with file.open("a", encoding="utf-8") as records:
            records.write(json.dumps(record, ensure_ascii=False) + "\n")


def _messages(exchanges: Sequence[_Exchange]) -> Iterator[Message]:
    return itertools.chain(*(exchange.messages for exchange in exchanges))
