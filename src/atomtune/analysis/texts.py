"""Texts: what the records of a data set say: prompts, answers, near-duplicates, scripts.

All of it is arrays with a few bytes a record: a million records fit, and none of their texts is kept.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from atomtune.analysis.near_duplicates import Numbers, folded, near_groups
from atomtune.analysis.shared_beginnings import beginnings_of, without_beginning
from atomtune.analysis.unicode_scripts import SCRIPTS, letters_of
from atomtune.data.records import Record

#: Records that the beginnings which many share are told from.
_TOLD_FROM = 1000
#: A record is near another by its longest text alone where that is all but one part in so many.
_OTHERS = 9
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
    beside: Numbers  # int64 [N], 0, or of a record that is one long text nearly all: equal for equal words beside it


class _Seen:
    """Collects by the way, while near_groups reads the texts."""

    def __init__(self, beginnings: Sequence[str]) -> None:
        self.beginnings = beginnings
        self.prompts, self.answers, self.blank = _Column("q"), _Column("q"), _Column("?")
        self.script, self.beside = _Column("b"), _Column("q")
        self.letters = numpy.zeros(len(SCRIPTS), dtype=numpy.int64)
        self._waiting: list[str] = []

    def own_texts(self, records: Iterable[Record]) -> Iterator[str]:
        for record in records:
            last = record.turns[-1]
            self.prompts.append(_hash(*_asked(record)))
            self.answers.append(_hash(last.text, last.reasoning, repr(last.calls)))
            learned = [record.turns[at] for at in record.learned]
            self.blank.append(any(not (turn.text.strip() or turn.calls) for turn in learned))
            self.beside.append(_beside_longest(record))
            text = own_text(record)
            self._waiting.append(text)
            if len(self._waiting) == _AT_ONCE:
                self.count_letters()
            yield without_beginning(text, self.beginnings)
        self.count_letters()

    def count_letters(self) -> None:
        if self._waiting:
            letters = letters_of(self._waiting)  # [texts, SCRIPTS]
            self.letters += letters.sum(axis=0)
            most_letters = letters.argmax(axis=1)
            self.script.extend(numpy.where(letters.any(axis=1), most_letters, -1))
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
    own = [turn.input or turn.text for turn in record.turns if turn.role != "system"]
    return "\n".join(own)


def _beside_longest(record: Record) -> int:
    """Of a record whose longest text makes it near any other with that text: a number for what else it says; else 0.

    Questions about one document are as many records, however little of each they are.
    """
    own = [turn for turn in record.turns if turn.role != "system"]
    lengths = [len(turn.input or turn.text) for turn in own]
    longest = max(lengths)
    # Two texts of which a share s each is their own have a Jaccard index of (1 - s) / (1 + s): 0.8 where s is 1/9.
    if (sum(lengths) - longest) * _OTHERS > sum(lengths):
        return 0
    rest = [turn.text if turn.input else "" for turn in own]  # instructions
    rest += [text for turn in own if len(text := turn.input or turn.text) < longest]
    return _hash(*map(folded, rest))


def _asked(record: Record) -> Iterator[str]:
    """All that is asked before the last answer; of a text that is learned whole that text, which nothing asks for."""
    if record.turns[-1].role == "text":
        yield record.answer
    for turn in record.prompt:
        yield from (turn.role, turn.text, turn.input)
        if turn.calls:
            yield repr(turn.calls)
    if record.tools:
        yield repr(record.tools)
    if record.variables:
        yield repr(record.variables)


def _hash(*texts: str) -> int:
    content = "\x1f".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


def read_texts(records: Iterable[Record]) -> Texts:
    """One pass over the records."""
    # The first records are read ahead: what many of them begin with is cut off before texts are compared.
    coming = iter(records)
    first = list(itertools.islice(coming, _TOLD_FROM))
    seen = _Seen(beginnings_of([own_text(record) for record in first]))
    near = near_groups(seen.own_texts(itertools.chain(first, coming)))
    columns = (seen.prompts.whole(), seen.answers.whole())
    return Texts(*columns, near, seen.script.whole(), seen.letters, seen.blank.whole(), seen.beside.whole())
