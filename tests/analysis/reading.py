"""The texts of records that are at hand; a run reads its own from files."""

from collections.abc import Sequence

from atomtune.analysis.texts import Texts, read_texts, sampled_rows
from atomtune.data.records import Record


def texts_of(records: Sequence[Record]) -> Texts:
    """The statistics of these records, as if they were one file's."""
    (rows,) = sampled_rows([len(records)])
    return read_texts(records, [records[row] for row in rows])
