"""Record types: Turn, Record, Piece, Exchange, Example and Refusal, the immutable steps from a record to token ids."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, Literal, NamedTuple, TypeVar

#: A turn of role `text` is plain text outside any dialogue; all of it is learned.
Role = Literal["system", "user", "assistant", "tool", "text"]
Part = TypeVar("Part")  # of a prompt: its text, its Piece or its ids
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. A user turn may have an instruction (`text`) and the `input` it applies to."""

    role: Role
    text: str
    input: str = ""
    learn: int = 1  # roles assistant and text: how many times the loss counts its tokens; 0: context only
    reasoning: str = ""  # the assistant's reasoning before its text
    # The assistant's tool calls: {"id": …, "name": …, "arguments": {…}}; "id" is optional.
    calls: tuple[Mapping[str, Any], ...] = ()
    name: str = ""  # role tool: the name of the tool that answers
    call_id: str = ""  # role tool: the id of the call that is answered, if the record has one


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation that ends with an assistant turn, or a single turn of role `text`."""

    turns: tuple[Turn, ...]
    origin: str  # "train.jsonl:17"
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas of the available tools, in the form of OpenAI's `tools`
    variables: Mapping[str, Any] = field(default_factory=dict)  # for the chat template, for example enable_thinking

    @property
    def prompt(self) -> tuple[Turn, ...]:
        return self.turns[:-1]

    @property
    def answer(self) -> str:
        return self.turns[-1].text

    @property
    def learned(self) -> tuple[int, ...]:
        """Indices of the turns that are learned."""
        return tuple(i for i, turn in enumerate(self.turns) if turn.learn and turn.role in ("assistant", "text"))


class Piece(NamedTuple):
    """A span of text that is either learned or not. A tuple: a frozen dataclass takes three times as long to create.

    breaks  offsets, one inside each control string that the record's own text contains. No control token may span
            such an offset, so the string stays text (law 2 of data/encoding/encode.py).
    """

    text: str
    learn: bool
    breaks: tuple[int, ...] = ()


class Prompt(NamedTuple, Generic[Part]):
    """Everything before an answer, in parts: the first `length` parts of `history`, then `asks`.

    All prompts of a conversation can share one `history` list. Separate lists would take memory and time quadratic in
    the number of turns.

    history    h0  h1  h2  h3
    prompt 1   h0  asks               length 1
    prompt 2   h0  h1  h2  asks       length 3
    """

    history: list[Part]
    length: int
    asks: Part

    def parts(self, start: int = 0) -> Iterator[Part]:
        """The parts from index `start` on, `asks` included."""
        yield from self.history[start : self.length]
        yield self.asks

    def goes_on_from(self, before: "Prompt[Part]") -> bool:
        """Whether this prompt starts with all parts of `before` except its `asks`."""
        if self.length < before.length:
            return False
        same = self.history is before.history
        return same or self.history[: before.length] == before.history[: before.length]


def shared_parts(prompts: Iterable[Prompt[Any]]) -> Iterator[int]:
    """For each prompt of a conversation, how many leading parts it shares with the previous one: its history, or 0."""
    before: Prompt[Any] | None = None
    for prompt in prompts:
        yield before.length if before is not None and prompt.goes_on_from(before) else 0
        before = prompt


def with_each_part(prompts: Sequence[Prompt[Part]], make: Callable[[Part], Made]) -> Iterator[Prompt[Made]]:
    """Convert the parts of a conversation's prompts with `make`; a shared history is converted once."""
    history: list[Made] = []
    for prompt, shared in zip(prompts, shared_parts(prompts), strict=True):
        if len(history) > shared:
            history = []
        history += map(make, prompt.history[shared : prompt.length])
        yield Prompt(history, prompt.length, make(prompt.asks))


class Exchange(NamedTuple):
    """An answer that is learned `learn` times, and its prompt: everything that a server would receive before it."""

    prompt: Prompt[Piece]  # split only at places where the parts tokenize to the ids of the whole
    answer: Piece
    learn: int
    at: int  # index of the answer among the record's turns
    stop: str  # the control token that ends the answer
    lost: tuple[str, ...] = ()  # notes on parts of the answer that the template leaves out


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a record, or of some of its answers with their prompt, and how many times each token is learned.

    ids     [T]
    learn   [T]  how many times the loss counts the token; 0 for a prompt
    origin  "train.jsonl:17"
    Raises ValueError if the lengths differ, or if the first token is to be learned.
    """

    ids: tuple[int, ...]
    learn: tuple[int, ...]
    origin: str

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.learn):
            raise ValueError(f"{self.origin}: {len(self.ids)} ids but {len(self.learn)} learn marks")
        if self.learn and self.learn[0]:
            raise ValueError(f"{self.origin}: the first token cannot be learned: there is nothing before it")


def learned_spans(example: Example) -> list[tuple[int, int]]:
    """Each run of learned tokens as (start, end), end exclusive.

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
    """Why a record was refused, for use in code; `Refusal.reason` is the text for the user."""

    UNREADABLE = "unreadable"  # the line or row cannot be parsed
    NO_RECORD = "no record"  # it can be parsed, but is not a record of the file's format
    TEMPLATE = "template"  # the chat template cannot express it, or the tokenizer fails on it
    TOO_LONG = "too long"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A record that is left out of training, and why. A `broken` one stops the run unless --skip_bad is set."""

    origin: str
    reason: str
    kind: RefusalKind
    broken: bool = True


class ParsedRecord(NamedTuple):
    """The result of reading one value of a file. A tuple for speed: one is created per record."""

    outcome: Record | Refusal
    notes: tuple[str, ...] = ()  # accepted, but worth reporting; empty if the record is refused
