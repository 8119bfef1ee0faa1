"""Checks: the records of a data set that have a problem.

All results are arrays of a few bytes per record, so that a million records fit into memory.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy
import pyarrow
import pyarrow.compute
from numpy.typing import NDArray

from atomtune.analysis.near_duplicates import equal_groups, joined
from atomtune.analysis.texts import Texts
from atomtune.choices import CHECKS, Check
from atomtune.data.ledger import Ledger

Rows = NDArray[numpy.int64]
Marks = NDArray[numpy.bool_]

#: What the number of each check counts.
MEANINGS: Mapping[Check, str] = {
    "refused": "cannot be used; the reason is next to each",
    "cut": "their prompt was shortened to fit --max_seq_length",
    "duplicates": "token for token the same as an earlier record",
    "near_duplicates": "nearly the same as an earlier record, not counting exact copies",
    "conflicts": "the same prompt as another record, but a different answer",
    "control": "their text contains a special token, which is kept as plain text",
    "blank": "an answer of nothing but whitespace",
    "one_token": "an answer of one token, apart from its stop token",
    "no_stop": "an answer that does not end with the stop token",
    "unknown": "a learned token that the tokenizer does not know",
}


@dataclass(frozen=True)
class Tokens:
    """Statistics of the tokens of N records with A answers."""

    longest: NDArray[numpy.int32]  # [N] tokens of the record's longest Example
    read: NDArray[numpy.int32]  # [N] tokens that are not learned
    answers: NDArray[numpy.int32]  # [A] learned tokens of each answer, its stop token included
    copies: Rows  # [N] the first record with the same tokens
    one_token: Marks  # [N] an answer of one token besides its stop token
    no_stop: Marks  # [N] an answer without a stop token at its end
    unknown: Marks  # [N] an unknown token among the learned ones


@dataclass(frozen=True)
class Finding:
    """The result of one check: the number of records and their rows; refused records have no row."""

    check: Check
    count: int
    rows: Rows = field(default_factory=lambda: numpy.zeros(0, dtype=numpy.int64))
    groups: int = 0


def read_tokens(tables: Iterable[pyarrow.Table], *, stops: Sequence[int], unknown: int | None) -> Tokens:
    """Compute the statistics in one pass over rows of the example cache (columns ids, learn, ends, digest).

    tables   the rows, in parts
    stops    ids of tokens that may end an answer: in gpt-oss, a tool call ends with another token than a text
    unknown  id of the unknown token, or None
    """
    parts = [_read_table(table, stops, unknown) for table in tables]
    if not parts:
        none, no_marks = numpy.zeros(0, dtype=numpy.int32), numpy.zeros(0, dtype=bool)
        return Tokens(none, none, none, numpy.zeros(0, dtype=numpy.int64), no_marks, no_marks, no_marks)
    digests = numpy.concatenate([digest for _, digest in parts])
    tokens = [part for part, _ in parts]
    return Tokens(
        longest=numpy.concatenate([part.longest for part in tokens]),
        read=numpy.concatenate([part.read for part in tokens]),
        answers=numpy.concatenate([part.answers for part in tokens]),
        copies=equal_groups(digests),
        one_token=numpy.concatenate([part.one_token for part in tokens]),
        no_stop=numpy.concatenate([part.no_stop for part in tokens]),
        unknown=numpy.concatenate([part.unknown for part in tokens]),
    )


def _read_table(table: pyarrow.Table, stops: Sequence[int], unknown: int | None) -> tuple[Tokens, Rows]:
    """The statistics of R rows, and the digest of each row, from which the caller computes `copies` for all rows."""
    ids = _flat(table["ids"])  # [T] of all rows, concatenated
    learned = _flat(table["learn"]) > 0  # [T]
    ends = _flat(table["ends"])  # [E] end of each Example, counted from the start of its row
    row_lengths = pyarrow.compute.list_value_length(table["ids"]).to_numpy()  # [R]
    row_examples = pyarrow.compute.list_value_length(table["ends"]).to_numpy()  # [R]
    n_rows = len(row_lengths)
    row_of_token = numpy.repeat(numpy.arange(n_rows), row_lengths)  # [T]
    answer_starts, answer_ends = _answers(learned)  # [A]
    answer_lengths = answer_ends - answer_starts + 1

    is_unknown = numpy.zeros(len(ids), dtype=bool)
    if unknown is not None:
        is_unknown = learned & (ids == unknown)
    short_answers = answer_starts[answer_lengths <= 2]  # a token and the stop token
    unstopped_answers = answer_ends[~numpy.isin(ids[answer_ends], stops)]
    tokens = Tokens(
        longest=_longest_examples(ends, row_examples).astype(numpy.int32),
        read=numpy.bincount(row_of_token[~learned], minlength=n_rows).astype(numpy.int32),
        answers=answer_lengths.astype(numpy.int32),
        copies=numpy.arange(n_rows),
        one_token=_marks(row_of_token[short_answers], n_rows),
        no_stop=_marks(row_of_token[unstopped_answers], n_rows),
        unknown=_marks(row_of_token[is_unknown], n_rows),
    )
    return tokens, table["digest"].to_numpy()


def _longest_examples(ends: NDArray[numpy.int32], row_examples: NDArray[numpy.int32]) -> NDArray[numpy.int32]:
    """[R] The number of tokens of each row's longest Example."""
    # rows       0        1    2          with 2, 1 and 3 Examples
    # ends       40 70    25   30 50 90   counted from the start of the row
    # lengths    40 30    25   30 20 40
    first_example = numpy.cumsum(row_examples) - row_examples  # [R]
    lengths = numpy.diff(ends, prepend=0)  # [E]
    lengths[first_example] = ends[first_example]
    longest: NDArray[numpy.int32] = numpy.maximum.reduceat(lengths, first_example)
    return longest


def _answers(learned: Marks) -> tuple[Rows, Rows]:
    """[A] The indices of the first and the last token of each run of learned tokens.

    The first token of an Example is never learned, so no run spans two Examples.
    """
    # learned    . . 1 1 1 . . 1 1
    # first          ^         ^
    # last               ^       ^
    before = numpy.concatenate([[False], learned[:-1]])
    after = numpy.concatenate([learned[1:], [False]])
    return numpy.flatnonzero(learned & ~before), numpy.flatnonzero(learned & ~after)


def _flat(column: pyarrow.ChunkedArray) -> NDArray[numpy.int32]:
    flat: NDArray[numpy.int32] = pyarrow.compute.list_flatten(column).to_numpy()
    return flat


def _marks(rows: Rows, n_rows: int) -> Marks:
    """[n_rows] Whether each row is in `rows`."""
    return numpy.bincount(rows, minlength=n_rows) > 0


def findings_of(ledger: Ledger, texts: Texts, tokens: Tokens, rows_named: Mapping[str, Rows]) -> dict[Check, Finding]:
    """The findings of all checks in the order of CHECKS, including those that found nothing.

    rows_named  the rows for `cut` and `control`, whose records the ledger names by origin
    """
    n_rows = len(tokens.copies)
    all_rows = numpy.arange(n_rows)
    firsts = numpy.flatnonzero(tokens.copies == all_rows)  # without the later ones of exact copies
    conflicts = _conflicting_rows(texts)
    findings = [
        Finding("refused", len(ledger.records_refused)),
        Finding("cut", ledger.records_cut, rows_named["cut"]),
        _repetitions("duplicates", tokens.copies, all_rows),
        _repetitions("near_duplicates", near_or_equal(texts, tokens)[firsts], firsts),
        Finding("conflicts", len(conflicts), conflicts, groups=len(numpy.unique(texts.prompts[conflicts]))),
        Finding("control", len(ledger.control_origins), rows_named["control"]),
        _marked("blank", texts.blank),
        _marked("one_token", tokens.one_token),
        _marked("no_stop", tokens.no_stop),
        _marked("unknown", tokens.unknown),
    ]
    by_check = {finding.check: finding for finding in findings}
    return {check: by_check[check] for check in CHECKS}


def _marked(check: Check, marks: Marks) -> Finding:
    return Finding(check, int(marks.sum()), numpy.flatnonzero(marks))


def near_or_equal(texts: Texts, tokens: Tokens) -> Rows:
    """[N] The group of each record, named by its first record: near-duplicates, or records with equal tokens.

    Records about the same long document are not near-duplicates for that reason alone, although `texts.near` groups
    them: their other texts, in `texts.beside`, must be equal too.
    """
    _, near = numpy.unique(numpy.stack([texts.near, texts.beside]), axis=1, return_inverse=True)
    return joined(equal_groups(near.reshape(-1)), tokens.copies)


def _repetitions(check: Check, groups: Rows, rows: Rows) -> Finding:
    """Finding whose count is the rows that repeat an earlier one; its rows include the first ones, group by group."""
    sizes = numpy.bincount(groups)
    repeated = numpy.flatnonzero(sizes[groups] > 1)
    by_group = numpy.argsort(groups[repeated], kind="stable")
    n_groups = int((sizes > 0).sum())
    return Finding(check, len(groups) - n_groups, rows[repeated[by_group]], groups=int((sizes > 1).sum()))


def _conflicting_rows(texts: Texts) -> Rows:
    """Rows whose prompt has a different answer in another record, sorted by prompt."""
    prompts = equal_groups(texts.prompts)  # [N]
    pairs = numpy.unique(numpy.stack([prompts, texts.answers]), axis=1)  # [2, P] distinct (prompt, answer) pairs
    answers_to = numpy.bincount(pairs[0], minlength=len(prompts))  # [N] at the first record of each prompt, else 0
    rows = numpy.flatnonzero(answers_to[prompts] > 1)
    by_prompt = numpy.argsort(prompts[rows], kind="stable")
    return rows[by_prompt]
