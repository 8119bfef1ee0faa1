"""The nouns of the walk: Turn, Record, Piece, Exchange, Example, Refusal, each frozen."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, Literal, NamedTuple, TypeVar

#: `text` is a stretch that belongs to no dialogue and is learned whole.
Role = Literal["system", "user", "assistant", "tool", "text"]
Part = TypeVar("Part")  # of a prompt: its text, its Piece or its ids
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says; a user's turn may hold an instruction (`text`) and the `input` it is about."""

    role: Role
    text: str
    input: str = ""
    learn: int = 1  # how often an assistant's turn or a text is learned; 0: it is only read
    reasoning: str = ""  # what an assistant thought before its text
    calls: tuple[
        Mapping[str, Any], ...
    ] = ()  # tools an assistant calls: {"id": …, "name": …, "arguments": {…}}, the id where there is one
    name: str = ""  # the tool that answers, in a turn of role tool
    call_id: str = ""  # the id of the call that it answers, where the record has one


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation, which ends with the assistant's turn; or a single turn of role text."""

    turns: tuple[Turn, ...]
    origin: str  # "train.jsonl:17"
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas of the tools at hand, as OpenAI's `tools`
    variables: Mapping[str, Any] = field(default_factory=dict)  # what it sets in its template, as enable_thinking

    @property
    def prompt(self) -> tuple[Turn, ...]:
        return self.turns[:-1]

    @property
    def answer(self) -> str:
        return self.turns[-1].text

    @property
    def learned(self) -> tuple[int, ...]:
        """Where the turns stand that are learned."""
        return tuple(i for i, turn in enumerate(self.turns) if turn.learn and turn.role in ("assistant", "text"))


class Piece(NamedTuple):
    """A stretch of text that is learned or not. A tuple: it takes a third of a frozen dataclass's time to make.

    `breaks` are positions inside control strings that a record's own text holds, which stay text
    (data.encoding.encode, law 2).
    """

    text: str
    learn: bool
    breaks: tuple[int, ...] = ()


class Prompt(NamedTuple, Generic[Part]):
    """What stands before an answer, in parts: the first `length` of `history`, and one that asks for the answer.

    The prompts of a conversation hold the same list, each more of it than the one before: as tuples of their own they
    would take memory and time by the square of its turns.
    """

    history: list[Part]
    length: int
    asks: Part

    def parts(self, start: int = 0) -> Iterator[Part]:
        """From the part `start` on."""
        yield from self.history[start : self.length]
        yield self.asks

    def goes_on_from(self, before: "Prompt[Part]") -> bool:
        """Whether it begins with all of another prompt but the part that asks."""
        if self.length < before.length:
            return False
        same = self.history is before.history
        return same or self.history[: before.length] == before.history[: before.length]


def shared_parts(prompts: Iterable[Prompt[Any]]) -> Iterator[int]:
    """For each prompt of a conversation, how many of its first parts are those of the prompt before it."""
    before: Prompt[Any] | None = None
    for prompt in prompts:
        yield before.length if before is not None and prompt.goes_on_from(before) else 0
        before = prompt


def with_each_part(prompts: Sequence[Prompt[Part]], make: Callable[[Part], Made]) -> Iterator[Prompt[Made]]:
    """The prompts of a conversation with each part made into something else, what they share once."""
    history: list[Made] = []
    for prompt, shared in zip(prompts, shared_parts(prompts), strict=True):
        if len(history) > shared:
            history = []
        history += map(make, prompt.history[shared : prompt.length])
        yield Prompt(history, prompt.length, make(prompt.asks))


class Exchange(NamedTuple):
    """An answer that is learned `learn` times, and everything a server would be sent before it."""

    prompt: Prompt[Piece]  # cut only where the ids of the parts are those of the whole
    answer: Piece
    learn: int
    at: int  # which of the record's turns the answer is
    stop: str  # the control token behind the answer
    lost: tuple[str, ...] = ()  # notes on what of the answer the template does not write


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one record, or of one answer in it and what stands before, and how often each is learned."""

    ids: tuple[int, ...]
    learn: tuple[int, ...]
    origin: str

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.learn):
            raise ValueError(f"{self.origin}: {len(self.ids)} ids but {len(self.learn)} learn marks")
        if self.learn and self.learn[0]:
            raise ValueError(f"{self.origin}: the first token cannot be learned: there is nothing before it")


def learned_spans(example: Example) -> list[tuple[int, int]]:
    """Where each answer of an example begins and ends.

    learn  0 0 0 1 1 0 0 1 1 1   →   (3, 5), (7, 10)
    """
    spans: list[tuple[int, int]] = []
    start: int | None = None
    for i, times in enumerate((*example.learn, 0)):
        if times and start is None:
            start = i
        elif not times and start is not None:
            spans.append((start, i))
            start = None
    return spans


class RefusalKind(StrEnum):
    """Why a record is not trained on, for code; `Refusal.reason` is for people."""

    UNREADABLE = "unreadable"  # no value could be read here
    NO_RECORD = "no record"  # a value, but not a record of its file's format
    TEMPLATE = "template"  # the chat template cannot write it, or the tokenizer not take it apart
    TOO_LONG = "too long"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A record that is not trained on, and why. `broken` records stop a run unless --skip_bad."""

    origin: str
    reason: str
    kind: RefusalKind
    broken: bool = True


class ParsedRecord(NamedTuple):
    """What one value of a file was read as. A tuple: one is made for every record."""

    outcome: Record | Refusal
    notes: tuple[str, ...] = ()  # what was accepted but is worth saying; empty where the record is refused
