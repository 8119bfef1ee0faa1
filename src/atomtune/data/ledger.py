"""Ledger: what happened to every record and token in one pass over a data set: used, shortened or refused."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from atomtune.data.records import Example, Refusal, RefusalKind
from atomtune.errors import SHOWN, BadData, listing

#: If more records are refused than a message can list, this many are named for each reason.
_OF_A_REASON = 3
#: Records that a notice names.
_FEW = 5
_NUMBER = re.compile(r"\d+")


@dataclass
class Ledger:
    """Counts of records and tokens in one pass over a file: records read = used + refused."""

    records_read: int = 0
    records_used: int = 0
    records_refused: list[Refusal] = field(default_factory=list)
    records_copied: int = 0  # used, and token for token equal to an earlier record
    prompt_tokens: int = 0
    target_tokens: int = 0
    examples: int = 0
    target_tokens_refused: int = 0  # in the answers of refused records that could be parsed
    format: str = ""  # the format of the file: alpaca, messages, …; several are joined with commas
    cut_origins: list[str] = field(default_factory=list)  # records whose prompts were shortened
    cut_tokens: list[int] = field(default_factory=list)  # of the prompts of each record in cut_origins
    # Records used as several Examples: not every prompt continues the one before token for token.
    split_origins: list[str] = field(default_factory=list)
    control_origins: list[str] = field(default_factory=list)  # records whose own text contains a control string
    unknown_tokens: int = 0  # target tokens that are the tokenizer's unknown token
    records_with_thoughts: int = 0  # used, with reasoning in a learned answer
    longest_tokens: int = 0
    notices: Counter[str] = field(default_factory=Counter)  # note → number of records it applies to
    shared_instruction: str | None = None  # the instruction that nearly all records have in common

    @property
    def records_cut(self) -> int:
        return len(self.cut_origins)

    @property
    def prompt_tokens_cut(self) -> int:
        return sum(self.cut_tokens)

    @property
    def records_split(self) -> int:
        return len(self.split_origins)

    def refuse(self, refusal: Refusal, target_tokens: int = 0) -> None:
        """Count a refused record; `target_tokens` are those of its answers, as far as they are known."""
        self.records_refused.append(refusal)
        self.target_tokens_refused += target_tokens

    def cut(self, origin: str, tokens: int) -> None:
        """Count a record whose prompts were shortened by this number of tokens."""
        self.cut_origins.append(origin)
        self.cut_tokens.append(tokens)

    def use(self, examples: Sequence[Example], *, prompt_tokens: int, target_tokens: int) -> None:
        """Count a record that is trained on.

        The caller passes the token counts: the encoder knows them, and a long Example takes time to count.
        """
        self.records_used += 1
        self.examples += len(examples)
        self.prompt_tokens += prompt_tokens
        self.target_tokens += target_tokens
        self.longest_tokens = max(self.longest_tokens, *(len(example.ids) for example in examples))

    def refused_as(self, kind: RefusalKind) -> list[Refusal]:
        return [refusal for refusal in self.records_refused if refusal.kind == kind]

    def add(self, other: "Ledger") -> None:
        """Add another ledger's counts and lists: of later records of the same file, or of another file."""
        for field_ in fields(self):
            mine, theirs = getattr(self, field_.name), getattr(other, field_.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, list):
                mine += theirs
            elif field_.name == "longest_tokens":
                self.longest_tokens = max(mine, theirs)
            elif isinstance(mine, int):
                setattr(self, field_.name, mine + theirs)
        formats = [*self.format.split(", "), *other.format.split(", ")]
        self.format = ", ".join(dict.fromkeys(filter(None, formats)))

    def sentences(self) -> Iterator[str]:
        """The notices, each with its number of records."""
        for notice, count in self.notices.items():
            yield f"in {count:,} records, {notice}."

    @property
    def broken(self) -> list[Refusal]:
        return [refusal for refusal in self.records_refused if refusal.broken]

    def to_run_json(self) -> dict[str, Any]:
        """The keys of `run.json` that describe the data."""
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
            "records_split_origins": self.split_origins,
        }

    def to_json(self) -> dict[str, Any]:
        refused = [asdict(refusal) for refusal in self.records_refused]
        return {**vars(self), "records_refused": refused, "notices": dict(self.notices)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Ledger":
        """The inverse of `to_json`."""
        refused = []
        for refusal in values["records_refused"]:
            kind = RefusalKind(refusal["kind"])
            refused.append(Refusal(**{**refusal, "kind": kind}))
        return cls(**{**values, "records_refused": refused, "notices": Counter(values["notices"])})


def refuse_unusable(ledger: Ledger, sources: Sequence[str], *, all_in: str = "") -> None:
    """Raise BadData with the reasons if no record of these sources can be used.

    all_in  a file that lists every refused record, if there is one
    """
    if ledger.records_used:
        return
    named, read = ", ".join(sources), ledger.records_read
    ending = f"{named}: none of {read:,} records can be used. Fix the records listed above."
    raise BadData("\n".join([listed_refusals(ledger.records_refused, all_in=all_in), ending]))


def refuse_broken(ledger: Ledger, *, skip_bad: bool, all_in: str = "") -> None:
    """Raise BadData with the broken records, if there are any and `skip_bad` is not set.

    all_in  a file that lists every refused record, if there is one
    """
    broken = ledger.broken
    if not broken or skip_bad:
        return
    refused, read, used = len(ledger.records_refused), ledger.records_read, ledger.records_used
    ending = f"{refused:,} of {read:,} records refused."
    if used:
        ending += f" --skip_bad trains on the other {used:,}."
    raise BadData("\n".join([listed_refusals(broken, all_in=all_in), ending]))


def about_broken(ledger: Ledger) -> str:
    """The warning of a command that continues without the broken records."""
    broken, read = len(ledger.broken), ledger.records_read
    return f"broken records, {broken:,} of {read:,}: train stops at them, unless --skip_bad leaves them out."


def listed_refusals(refused: Sequence[Refusal], *, all_in: str = "") -> str:
    """One line per refusal. If there are too many, the first few of each reason, so that none is crowded out.

    all_in  a file that lists every refused record, if there is one
    """
    shown = refused if len(refused) <= SHOWN else _first_of_each_reason(refused)
    lines = [f"{refusal.origin}  {refusal.reason}." for refusal in shown]
    listed = [listing(lines, unlisted=len(refused) - len(shown))]
    if all_in:
        listed.append(f"{all_in} lists them all.")
    return "\n".join(listed)


def first_few(origins: Sequence[str], *, all_in: str) -> str:
    """The first of these records, and how many more there are.

    all_in  a file that lists them all
    """
    rest = len(origins) - _FEW
    return ", ".join(origins[:_FEW]) + (f" and {rest:,} more ({all_in} lists them all)" if rest > 0 else "")


def one_of_each_reason_first(refused: Sequence[Refusal]) -> list[Refusal]:
    """The first refusal of each reason, the most frequent reason first, then all others in order."""
    frequent = [reason for reason, _ in Counter(map(_kind_of_reason, refused)).most_common()]
    first = {_kind_of_reason(refusal): refusal for refusal in reversed(refused)}
    named = [first[reason] for reason in frequent]
    return [*named, *(refusal for refusal in refused if first[_kind_of_reason(refusal)] is not refusal)]


def _first_of_each_reason(refused: Sequence[Refusal]) -> list[Refusal]:
    seen: Counter[str] = Counter()
    first = []
    for refusal in refused:
        reason = _kind_of_reason(refusal)
        seen[reason] += 1
        if seen[reason] <= _OF_A_REASON:
            first.append(refusal)
    return first


def _kind_of_reason(refusal: Refusal) -> str:
    """The reason without its numbers: `not UTF-8 at byte 1` and `not UTF-8 at byte 7` are one."""
    return _NUMBER.sub("", refusal.reason)
