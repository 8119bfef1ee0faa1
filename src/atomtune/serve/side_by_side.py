"""Side by side: one conversation whose questions the tuned model answers and, where asked, its base too.

What a page shows is drawn from here; no page is needed to talk.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from atomtune.data.encoding.choose_template import probed
from atomtune.data.formats.schema import THINKING
from atomtune.model.generate import Sampling
from atomtune.serve.conversation import Conversation
from atomtune.serve.tuned_model import Reply, TunedModel

#: Who answers: the model with its adapter, or without.
Side = Literal["tuned", "base"]


@dataclass(frozen=True)
class Exchange:
    """A question and its answers; None: that side was not asked.

    In each answer the text as far as it is written, and the whole reply once it is.
    """

    question: str
    tuned: "Answer | None" = None
    base: "Answer | None" = None

    def by(self, side: Side) -> "Answer | None":
        return self.tuned if side == "tuned" else self.base

    def answered_by(self, side: Side, answer: "Answer") -> "Exchange":
        return replace(self, tuned=answer) if side == "tuned" else replace(self, base=answer)


@dataclass(frozen=True)
class Answer:
    """What is written of an answer; the reply once it ended, with its thoughts apart."""

    text: str = ""
    reply: Reply | None = None

    @property
    def thoughts(self) -> str:
        return self.reply.turn.reasoning.strip() if self.reply is not None and self.reply.turn.reasoning else ""

    @property
    def shown(self) -> str:
        """The answer without its thoughts; as long as it is being written, all of it."""
        if self.reply is None:
            return self.text
        return self.reply.turn.text.strip() if self.thoughts else self.text.strip()


@dataclass(frozen=True)
class Asking:
    """How a question is asked."""

    compare: bool = False
    system: str | None = None
    max_new_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0


def answered(
    tuned: TunedModel,
    before: Sequence[Exchange],
    question: str,
    asking: Asking,
    *,
    stop: Callable[[], bool],
    forgot: Callable[[int], None] = lambda count: None,
) -> Generator[Exchange, None, None]:
    """The exchange as it grows, the tuned model's answer first; a stopped answer keeps what is written of it.

    before  the exchanges so far: each side is sent its own answers
    stop    True ends the answer that is being written, and asks nobody further
    forgot  told how many of the oldest exchanges a side is no longer sent, because they do not fit
    Raises BadSettings where the question alone is longer than the model has positions for.
    """
    exchange = Exchange(question)
    sides: tuple[Side, ...] = ("tuned", "base") if asking.compare and tuned.has_base else ("tuned",)
    for side in sides:
        exchange = exchange.answered_by(side, Answer())
        yield exchange
        conversation = conversation_of(tuned, before, asking.system, side=side)
        if forgotten := conversation.make_room(question):
            forgot(forgotten)
        writing = tuned.stream_reply(
            conversation.asking(question),
            max_new_tokens=asking.max_new_tokens,
            sampling=asking.sampling,
            seed=asking.seed + len(before),  # as `chat` does: the same question again may be answered otherwise
            base=side == "base",
            stop_early=stop,
        )
        text = ""
        reply: Reply | None = None
        while reply is None:
            try:
                text += next(writing)
            except StopIteration as ended:
                reply = ended.value
            exchange = exchange.answered_by(side, Answer(text, reply))
            yield exchange
        if stop():
            return


def conversation_of(
    tuned: TunedModel, exchanges: Sequence[Exchange], system: str | None, *, side: Side = "tuned"
) -> Conversation:
    """What one side was asked and answered."""
    conversation = Conversation(tuned, system)
    for exchange in exchanges:
        answer = exchange.by(side)
        if answer is not None and answer.reply is not None:
            conversation.answered(exchange.question, answer.reply.turn)
    return conversation


def modes_of(tuned: TunedModel) -> dict[bool, TunedModel]:
    """The model asked to think and asked not to; none where its template has one mode."""
    template = tuned.template
    if THINKING not in template.source:
        return {}
    return {
        thinks: tuned.asked_by(probed(replace(template, variables={**template.variables, THINKING: thinks})))
        for thinks in (True, False)
    }
