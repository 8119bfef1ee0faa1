"""Profile: what a data set's texts and tokens are like, and which records have a problem.

Before: records, and the store's rows of the same records in the same order.  After: inspect.command says it.
All of it is arrays with a few bytes a record: a million records fit, and none of their texts is kept.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import pyarrow
import pyarrow.compute

from atomtune.analysis.near_duplicates import Numbers, equal_groups, joined, near_groups
from atomtune.data.records import Account, Record
from atomtune.analysis.unicode_scripts import SCRIPTS, letters_of
from atomtune.analysis.shared_beginnings import trunks_of, without_trunk

#: What can be wrong with a record, and what the number beside it counts.
PROBLEMS: Mapping[str, str] = {
    "refused": "cannot be used; the reason stands beside each",
    "cut": "their prompt was shortened to fit --max_seq_length",
    "duplicates": "token for token the same as an earlier record",
    "near_duplicates": "nearly the same as an earlier record, exact copies not counted",
    "conflicts": "the same prompt as another record, but another answer",
    "control": "a control string stands in their text; it stays text",
    "blank": "an answer of white space alone",
    "one_token": "an answer of one token, apart from its stop token",
    "no_stop": "an answer that does not end with the stop token",
    "unknown": "a learned token that the tokenizer does not know",
}
#: Records that the beginnings which many share are told from.
_TOLD_FROM = 1000
#: Texts whose letters are counted at once.
_AT_ONCE = 1000


@dataclass(frozen=True)
class Texts:
    """What is seen without a tokenizer, by record."""

    prompts: Numbers  # int64 [N], equal for equal prompts
    answers: Numbers  # int64 [N], equal for equal last answers
    near: Numbers  # int64 [N], equal in a group of nearly equal records
    script: Numbers  # int8 [N], the script of most letters, an index into SCRIPTS; -1 where there are no letters
    letters: Numbers  # int64 [len(SCRIPTS)], of all records
    blank: Numbers  # bool [N], an answer is white space


@dataclass(frozen=True)
class Tokens:
    """What is seen of the tokens, by record and by answer."""

    longest: Numbers  # int32 [N], tokens of the record, or of its longest part where it became several Examples
    read: Numbers  # int32 [N], tokens that are not learned
    answers: Numbers  # int32 [answers], learned tokens of each answer with its stop token
    copies: Numbers  # int64 [N], equal for records that are the same token for token
    one_token: Numbers  # bool [N]
    no_stop: Numbers  # bool [N]
    unknown: Numbers  # bool [N]


@dataclass(frozen=True)
class Problem:
    """One kind of problem: how many records it counts and where they stand; refused ones stand nowhere."""

    name: str
    count: int
    where: Numbers = field(default_factory=lambda: numpy.zeros(0, dtype=numpy.int64))
    groups: int = 0


class _Seen:
    """Collects by the way, while near_groups reads the texts."""

    def __init__(self, trunks: Sequence[str]) -> None:
        self.trunks = trunks
        self.prompts, self.answers, self.blank = _Column("q"), _Column("q"), _Column("?")
        self.script = _Column("b")
        self.letters = numpy.zeros(len(SCRIPTS), dtype=numpy.int64)
        self._waiting: list[str] = []

    def own_texts(self, records: Iterable[Record]) -> Iterator[str]:
        for record in records:
            self.prompts.append(_hash(*(part for turn in record.prompt for part in (turn.role, turn.text, turn.input))))
            last = record.turns[-1]
            self.answers.append(_hash(last.text, last.reasoning, repr(last.calls)))
            said = (record.turns[at] for at in record.learned)
            self.blank.append(any(not (turn.text.strip() or turn.calls) for turn in said))
            text = own_text(record)
            self._waiting.append(text)
            if len(self._waiting) == _AT_ONCE:
                self.count_letters()
            yield without_trunk(text, self.trunks)
        self.count_letters()

    def count_letters(self) -> None:
        if self._waiting:
            letters = letters_of(self._waiting)
            self.letters += letters.sum(axis=0)
            self.script.extend(numpy.where(letters.any(axis=1), letters.argmax(axis=1), -1))
            self._waiting = []


class _Column:
    """Numbers that arrive one or many at a time, kept in few bytes each."""

    def __init__(self, kind: str) -> None:
        self._kind, self._parts, self._last = kind, list[Numbers](), list[Any]()

    def append(self, value: Any) -> None:
        self._last.append(value)
        if len(self._last) == _AT_ONCE:
            self.extend([])

    def extend(self, values: Any) -> None:
        self._parts += [numpy.array(self._last, dtype=self._kind), numpy.asarray(values).astype(self._kind)]
        self._last = []

    def whole(self) -> Numbers:
        self.extend([])
        return numpy.concatenate(self._parts)


def own_text(record: Record) -> str:
    """What a record says itself: not its system text, nor an instruction that stands above an input.

    Many records share those word for word; compared with them, any two records of one task would be near.
    """
    said = [turn.input or turn.text for turn in record.turns if turn.role != "system"]
    return "\n".join(said)


def _hash(*texts: str) -> int:
    content = "\x1f".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


def read_texts(records: Iterable[Record]) -> Texts:
    """One pass over the records."""
    coming = iter(records)
    first = list(itertools.islice(coming, _TOLD_FROM))
    seen = _Seen(trunks_of([own_text(record) for record in first]))
    near = near_groups(seen.own_texts(itertools.chain(first, coming)))
    columns = (seen.prompts.whole(), seen.answers.whole())
    return Texts(*columns, near, seen.script.whole(), seen.letters, seen.blank.whole())


def read_tokens(tables: Iterable[pyarrow.Table], *, stop: int, unknown: int | None) -> Tokens:
    """One pass over rows of the store (columns ids, learn, ends, digest), some at a time."""
    parts = [_tokens(table, stop, unknown) for table in tables]
    columns = [numpy.concatenate(column) for column in zip(*parts, strict=True)]
    longest, read, answers, digests, *marks = columns or [numpy.zeros(0, dtype=numpy.int64)] * 7
    return Tokens(longest, read, answers, equal_groups(digests), *marks)


def _tokens(table: pyarrow.Table, stop: int, unknown: int | None) -> tuple[Numbers, ...]:
    ids, learned, ends = (_flat(table[name]) for name in ("ids", "learn", "ends"))
    learned = learned > 0
    sizes = pyarrow.compute.list_value_length(table["ids"]).to_numpy()  # [rows]
    parts = pyarrow.compute.list_value_length(table["ends"]).to_numpy()
    rows = numpy.repeat(numpy.arange(len(sizes)), sizes)  # [tokens]
    heads = numpy.cumsum(parts) - parts  # of each row's Examples
    lengths = numpy.diff(ends, prepend=0)
    lengths[heads] = ends[heads]
    # An Example's first token is never learned, so a run of learned tokens never reaches across two.
    first = numpy.flatnonzero(learned & ~numpy.concatenate([[False], learned[:-1]]))
    last = numpy.flatnonzero(learned & ~numpy.concatenate([learned[1:], [False]]))
    answers = (last - first + 1).astype(numpy.int32)
    return (
        numpy.maximum.reduceat(lengths, heads).astype(numpy.int32),
        numpy.bincount(rows[~learned], minlength=len(sizes)).astype(numpy.int32),
        answers,
        table["digest"].to_numpy(),
        _any(rows[first[answers <= 2]], len(sizes)),
        _any(rows[last[ids[last] != stop]], len(sizes)),
        _any(rows[learned & (ids == (-1 if unknown is None else unknown))], len(sizes)),
    )


def _flat(column: pyarrow.ChunkedArray) -> Numbers:
    flat: Numbers = pyarrow.compute.list_flatten(column).to_numpy()
    return flat


def _any(rows: Numbers, count: int) -> Numbers:
    return numpy.bincount(rows, minlength=count) > 0


def problems_of(account: Account, texts: Texts, tokens: Tokens, origins: Mapping[str, Numbers]) -> dict[str, Problem]:
    """Every kind of problem by name, those that count nothing included.

    origins  for `cut` and `control`: where the records stand that the account names
    """
    originals = numpy.flatnonzero(tokens.copies == numpy.arange(len(tokens.copies)))  # of exact copies only the first
    near = _repeats("near_duplicates", near_or_equal(texts, tokens)[originals], originals)
    conflicts = _conflicts(texts)
    found = [
        Problem("refused", len(account.records_refused)),
        Problem("cut", account.records_cut, origins["cut"]),
        _repeats("duplicates", tokens.copies, numpy.arange(len(tokens.copies))),
        near,
        Problem("conflicts", len(conflicts), conflicts, len(numpy.unique(texts.prompts[conflicts]))),
        Problem("control", len(account.control_origins), origins["control"]),
        *(_marked(name, marks) for name, marks in _marks(texts, tokens).items()),
    ]
    assert [one.name for one in found] == list(PROBLEMS)
    return {one.name: one for one in found}


def _marks(texts: Texts, tokens: Tokens) -> dict[str, Numbers]:
    marks = {"blank": texts.blank, "one_token": tokens.one_token, "no_stop": tokens.no_stop}
    return {**marks, "unknown": tokens.unknown}


def _marked(name: str, marks: Numbers) -> Problem:
    return Problem(name, int(marks.sum()), numpy.flatnonzero(marks))


def near_or_equal(texts: Texts, tokens: Tokens) -> Numbers:
    """A group for each record, by the number of its first: nearly equal in what it says, or equal in its tokens."""
    return joined(texts.near, tokens.copies)


def _repeats(name: str, groups: Numbers, rows: Numbers) -> Problem:
    """Counted are the rows that repeat an earlier one; shown are these and the first, group by group."""
    sizes = numpy.bincount(groups)
    repeated = numpy.flatnonzero(sizes[groups] > 1)
    where = rows[repeated[numpy.argsort(groups[repeated], kind="stable")]]
    return Problem(name, len(groups) - int((sizes > 0).sum()), where, int((sizes > 1).sum()))


def _conflicts(texts: Texts) -> Numbers:
    """Records whose prompt another record answers otherwise, prompt by prompt."""
    prompts = equal_groups(texts.prompts)
    pairs = numpy.unique(numpy.stack([prompts, texts.answers]), axis=1)  # each answer to each prompt once
    answers = numpy.bincount(pairs[0], minlength=len(prompts))
    where = numpy.flatnonzero(answers[prompts] > 1)
    return where[numpy.argsort(prompts[where], kind="stable")]
