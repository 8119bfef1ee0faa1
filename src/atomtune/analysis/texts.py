"""Texts: statistics of the records' texts: equal prompts and answers, near-duplicates, scripts.

All of them are arrays of a few bytes per record, and no texts are kept, so that a million records fit into memory.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from atomtune.analysis.near_duplicates import Numbers, folded, near_groups
from atomtune.analysis.shared_beginnings import beginnings_of, without_beginning
from atomtune.analysis.unicode_scripts import SCRIPTS, letters_of
from atomtune.data.records import Record

if TYPE_CHECKING:
    import datasets

#: Shared beginnings are searched in this many records.
_SAMPLED = 1000
#: Two records with the same longest text are near-duplicates if the rest is at most one ninth of their text.
_OTHERS = 9
#: Texts whose letters are counted at once, and values that a column buffers.
_AT_ONCE = 1000


@dataclass(frozen=True)
class Texts:
    """Statistics of N records that need no tokenizer."""

    prompts: Numbers  # int64 [N], hash of the prompt: equal for equal prompts
    answers: Numbers  # int64 [N], hash of the last answer
    near: Numbers  # int64 [N], group of near-duplicates: the index of its first record
    script: Numbers  # int8 [N], index into SCRIPTS of the script with the most letters; -1 if there are no letters
    letters: Numbers  # int64 [len(SCRIPTS)], letters of all records together
    blank: Numbers  # bool [N], whether a learned answer is empty or white space
    beside: Numbers  # int64 [N], if one long text dominates the record, hash of its other texts; else 0


class _Seen:
    """Collects the statistics of the records while near_groups reads their texts."""

    def __init__(self, beginnings: Sequence[str]) -> None:
        self.beginnings = beginnings
        self.prompts, self.answers, self.blank = _Column("q"), _Column("q"), _Column("?")
        self.script, self.beside = _Column("b"), _Column("q")
        self.letters = numpy.zeros(len(SCRIPTS), dtype=numpy.int64)
        self._waiting: list[str] = []

    def own_texts(self, records: Iterable[Record]) -> Iterator[str]:
        """Yield the text of each record to compare: its own, without a shared beginning."""
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
    """A growing array: values are appended one by one or in bulk, and stored compactly as numpy type `kind`."""

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
    """The record's own text: all turns without the system text, and without the instruction if there is an input.

    Many records share those word for word. If they were compared too, any two records of one task would be near.
    """
    own = [turn.input or turn.text for turn in record.turns if turn.role != "system"]
    return "\n".join(own)


def _beside_longest(record: Record) -> int:
    """A hash of the other texts, if the longest text alone makes the record near any other that has it; else 0.

    Different questions about one long document are different records, however short the questions are.
    """
    own = [turn for turn in record.turns if turn.role != "system"]
    lengths = [len(turn.input or turn.text) for turn in own]
    longest = max(lengths)
    # If a share s of each of two texts is its own, their Jaccard index is (1 - s) / (1 + s): 0.8 for s = 1/9.
    if (sum(lengths) - longest) * _OTHERS > sum(lengths):
        return 0
    rest = [turn.text if turn.input else "" for turn in own]  # instructions
    rest += [text for turn in own if len(text := turn.input or turn.text) < longest]
    return _hash(*map(folded, rest))


def _asked(record: Record) -> Iterator[str]:
    """Everything that makes up the prompt of the last answer; for a text that is learned whole, the text itself."""
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


def sampled_rows(lengths: Sequence[int]) -> list[list[int]]:
    """The rows of each source in which shared beginnings are searched; drawn from all, always the same.

    The first rows would not do: records of other kinds may follow.

    lengths  how many records each source has
    """
    total = sum(lengths)
    drawn = sorted(random.Random(0).sample(range(total), min(_SAMPLED, total)))
    bounds = itertools.pairwise(itertools.accumulate(lengths, initial=0))
    return [[row - start for row in drawn if start <= row < end] for start, end in bounds]


def texts_of_rows(
    stored: Sequence["datasets.Dataset"], reread: Callable[[Sequence["datasets.Dataset"]], Iterable[Record]]
) -> Texts:
    """The statistics of the stored rows of some sources, whose records are read again.

    reread  stored rows of each source → their records
    """
    rows = sampled_rows([len(examples) for examples in stored])
    sampled = [examples.select(own) for examples, own in zip(stored, rows, strict=True)]
    return read_texts(reread(stored), reread(sampled))


def read_texts(records: Iterable[Record], sample: Iterable[Record]) -> Texts:
    """Compute the statistics in one pass over the records.

    sample  those of sampled_rows: beginnings that they share are removed before texts are compared
    """
    seen = _Seen(beginnings_of([own_text(record) for record in sample]))
    near = near_groups(seen.own_texts(records))
    return Texts(
        prompts=seen.prompts.whole(),
        answers=seen.answers.whole(),
        near=near,
        script=seen.script.whole(),
        letters=seen.letters,
        blank=seen.blank.whole(),
        beside=seen.beside.whole(),
    )
