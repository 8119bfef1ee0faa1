"""Side by side: one conversation that the tuned model and, if wanted, also its base answer.

The web page draws its content from here; this module does not need a page.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from atomtune.data.encoding.template_probes import thinking_modes
from atomtune.model.generate import Sampling
from atomtune.serve.conversation import Conversation
from atomtune.serve.tuned_model import Reply, TunedModel

#: The model with its adapter, or without.
Side = Literal["tuned", "base"]


@dataclass(frozen=True)
class Answer:
    """The text of an answer so far and, once it is complete, the reply with its thoughts separated."""

    text: str = ""
    reply: Reply | None = None

    @property
    def thoughts(self) -> str:
        return self.reply.turn.reasoning.strip() if self.reply is not None and self.reply.turn.reasoning else ""

    @property
    def shown(self) -> str:
        """The answer without its thoughts; while it is being written, all of its text."""
        if self.reply is None:
            return self.text
        return self.reply.turn.text.strip() if self.thoughts else self.text.strip()


@dataclass(frozen=True)
class ShownExchange:
    """A question and the answers of both sides as a page shows them; None if that side was not asked.

    An answer has the text written so far, and once it is complete, also the reply.
    """

    question: str
    tuned: Answer | None = None
    base: Answer | None = None

    def by(self, side: Side) -> Answer | None:
        return self.tuned if side == "tuned" else self.base

    def answered_by(self, side: Side, answer: Answer) -> "ShownExchange":
        return replace(self, tuned=answer) if side == "tuned" else replace(self, base=answer)


@dataclass(frozen=True)
class Asking:
    """Settings of a question."""

    compare: bool = False
    system: str | None = None
    max_new_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0


def answers_of_sides(
    tuned: TunedModel,
    before: Sequence[ShownExchange],
    question: str,
    asking: Asking,
    *,
    stop: Callable[[], bool],
    forgot: Callable[[int], None] = lambda count: None,
) -> Generator[ShownExchange, None, None]:
    """Yield the exchange as it grows, first with the tuned model's answer; a stopped answer keeps its text so far.

    before  the exchanges so far; each side is sent its own answers
    stop    if it returns True, the present answer ends, and no other side is asked
    forgot  called with how many of the oldest exchanges a side is no longer sent, because they do not fit
    Raises BadSettings if the question alone is longer than the model's positions.
    """
    exchange = ShownExchange(question)
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
            seed=asking.seed + len(before),  # as in `chat`, so that the same question may get another answer
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
    tuned: TunedModel, exchanges: Sequence[ShownExchange], system: str | None, *, side: Side = "tuned"
) -> Conversation:
    """The conversation of one side, from its completed answers."""
    conversation = Conversation(tuned, system)
    for exchange in exchanges:
        answer = exchange.by(side)
        if answer is not None and answer.reply is not None:
            conversation.remember(exchange.question, answer.reply)
    return conversation


def models_by_mode(tuned: TunedModel) -> dict[bool, TunedModel]:
    """The model in its thinking and its non-thinking mode; empty if its template has only one mode."""
    return {thinks: tuned.with_template(mode) for thinks, mode in thinking_modes(tuned.template).items()}
