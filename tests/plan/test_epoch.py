"""The records of an epoch, and how many of them are held out."""

import datasets
import pytest

from atomtune.plan.epoch import Epoch


def epoch(*, rows: int, records: int) -> Epoch:
    return Epoch(datasets.Dataset.from_dict({"row": list(range(rows))}), records, target_tokens=0.0, longest_tokens=1)


@pytest.mark.parametrize(
    ("eval_size", "held_out"),
    [(0, 0), (7, 7), (7.0, 7), (0.1, 10), (0.016, 2), (1, 1), (99, 99), (100, 99), (5000, 99), (0.999, 99)],
)
def test_a_share_or_a_number_of_records_is_held_out_and_one_is_always_learned(eval_size, held_out):
    plain = epoch(rows=100, records=100)
    assert (plain.held_out(eval_size), plain.learned(eval_size)) == (held_out, 100 - held_out)


def test_of_a_mix_the_share_of_the_records_that_are_learned_is_that_of_the_rows():
    # 300 rows of 200 records, because one file is read twice: a quarter held out leaves three quarters of the rows.
    mixed = epoch(rows=300, records=200)
    assert (mixed.held_out(0.25), mixed.learned(0.25)) == (50, 225)
    assert epoch(rows=1, records=200).learned(199) == 1, "an epoch has a row"
