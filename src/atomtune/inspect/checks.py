"""Checks: which records of a data set have a problem.

Every figure is an array with a few bytes a record: a million records fit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy
import pyarrow
import pyarrow.compute

from atomtune.analysis.near_duplicates import Numbers, equal_groups, joined
from atomtune.analysis.texts import Texts
from atomtune.data.ledger import Ledger

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


def problems_of(ledger: Ledger, texts: Texts, tokens: Tokens, origins: Mapping[str, Numbers]) -> dict[str, Problem]:
    """Every kind of problem by name, those that count nothing included.

    origins  for `cut` and `control`: where the records stand that the ledger names
    """
    originals = numpy.flatnonzero(tokens.copies == numpy.arange(len(tokens.copies)))  # of exact copies only the first
    near = _repeats("near_duplicates", near_or_equal(texts, tokens)[originals], originals)
    conflicts = _conflicts(texts)
    found = [
        Problem("refused", len(ledger.records_refused)),
        Problem("cut", ledger.records_cut, origins["cut"]),
        _repeats("duplicates", tokens.copies, numpy.arange(len(tokens.copies))),
        near,
        Problem("conflicts", len(conflicts), conflicts, len(numpy.unique(texts.prompts[conflicts]))),
        Problem("control", len(ledger.control_origins), origins["control"]),
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
