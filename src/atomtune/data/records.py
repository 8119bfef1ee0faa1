"""The nouns of the walk: Turn, Record, Piece, Exchange, Example, Refusal, and the Account that loses none of them.

Before: a line in a file.  After: batch.row makes Rows of Examples.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple

#: `text` is a stretch that belongs to no dialogue and is learned whole.
Role = Literal["system", "user", "assistant", "tool", "text"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says; a user's turn may hold an instruction (`text`) and the `input` it is about."""

    role: Role
    text: str
    input: str = ""
    learn: int = 1  # how often an assistant's turn or a text is learned; 0: it is only read
    reasoning: str = ""  # what an assistant thought before its text
    calls: tuple[Mapping[str, Any], ...] = ()  # tools an assistant calls: {"name": …, "arguments": {…}}
    name: str = ""  # the tool that answers, in a turn of role tool


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation, which ends with the assistant's turn; or a single turn of role text."""

    turns: tuple[Turn, ...]
    origin: str  # "train.jsonl:17"
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas of the tools at hand, as OpenAI's `tools`

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

    `breaks` are positions no token may reach across: each lies inside a control string that a record's own text
    holds, so that it stays text (data.encoding.encode, law 2).
    """

    text: str
    learn: bool
    breaks: tuple[int, ...] = ()


class Exchange(NamedTuple):
    """An answer that is learned `learn` times, and everything a server would be sent before it."""

    prompt: Piece
    answer: Piece
    learn: int
    at: int  # which of the record's turns the answer is


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
            raise ValueError(f"{self.origin}: the first token cannot be learned, nothing stands before it")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A record that is not trained on, and why. `broken` records stop a run unless --skip_bad."""

    origin: str
    reason: str
    broken: bool = True


@dataclass
class Account:
    """Where every record and token of one pass over a file went: read = used + refused."""

    records_read: int = 0
    records_used: int = 0
    records_refused: list[Refusal] = field(default_factory=list)
    records_cut: int = 0
    records_split: int = 0  # used, and more than one Example, since a server would send earlier answers otherwise
    records_copied: int = 0  # used, and token for token the same as an earlier one
    prompt_tokens: int = 0
    target_tokens: int = 0
    examples: int = 0
    target_tokens_refused: int = 0  # in the answers of refused records, as far as they could be read
    prompt_tokens_cut: int = 0
    format: str = ""  # how the file's values were read: alpaca, messages, …
    cut_origins: list[str] = field(default_factory=list)
    split_origins: list[str] = field(default_factory=list)
    control_origins: list[str] = field(default_factory=list)  # records whose text holds a control string
    unknown_tokens: int = 0  # targets the tokenizer has no token for
    longest_tokens: int = 0
    notices: Counter[str] = field(default_factory=Counter)  # what was accepted but is worth saying
    shared_instruction: str | None = None  # the one instruction nearly all records carry

    def refuse(self, refusal: Refusal, target_tokens: int = 0) -> None:
        self.records_refused.append(refusal)
        self.target_tokens_refused += target_tokens

    def cut(self, origin: str, tokens: int) -> None:
        self.records_cut += 1
        self.cut_origins.append(origin)
        self.prompt_tokens_cut += tokens

    def use(self, examples: Sequence[Example]) -> None:
        """Enter one record that is trained on, as the Examples it became."""
        self.records_used += 1
        self.examples += len(examples)
        for example in examples:
            targets = sum(example.learn)
            self.target_tokens += targets
            self.prompt_tokens += example.learn.count(0)
            self.longest_tokens = max(self.longest_tokens, len(example.ids))

    def add(self, other: "Account") -> None:
        """Enter all of another account, of later records of the same file or of another file."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, list):
                mine += theirs
            elif isinstance(mine, int):
                setattr(self, one.name, max(mine, theirs) if one.name == "longest_tokens" else mine + theirs)
        if other.format not in self.format.split(", "):
            self.format = ", ".join(filter(None, (self.format, other.format)))

    @property
    def broken(self) -> list[Refusal]:
        return [refusal for refusal in self.records_refused if refusal.broken]

    def contract(self) -> dict[str, Any]:
        """The data keys of `run.json`."""
        return {
            "records_read": self.records_read,
            "records_used": self.records_used,
            "records_refused": [{"origin": r.origin, "reason": r.reason} for r in self.records_refused],
            "records_cut": self.records_cut,
            "records_copied": self.records_copied,
            "records_split": self.records_split,
            "examples": self.examples,
            "prompt_tokens": self.prompt_tokens,
            "target_tokens": self.target_tokens,
            "target_tokens_refused": self.target_tokens_refused,
            "prompt_tokens_cut": self.prompt_tokens_cut,
            "format": self.format,
            "records_with_control_strings": self.control_origins,
            "records_cut_origins": self.cut_origins,
        }

    def to_json(self) -> dict[str, Any]:
        refused = [asdict(refusal) for refusal in self.records_refused]
        return {**vars(self), "records_refused": refused, "notices": dict(self.notices)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Account":
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            raise ValueError("the account was written by another version")
        refused = [Refusal(**refusal) for refusal in values["records_refused"]]
        return cls(**{**values, "records_refused": refused, "notices": Counter(values["notices"])})
