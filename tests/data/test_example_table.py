"""Laws of the table: rows are the Examples as they were, and only rows that are equal in everything are copies."""

import datasets

from atomtune.data.example_table import as_examples, as_table, copies_in
from atomtune.data.records import Example

WHOLE = (Example((1, 5, 6, 5, 7), (0, 0, 1, 0, 1), "a:1"),)
LEARNED_TWICE = (Example((1, 5, 6, 5, 7), (0, 0, 2, 0, 1), "a:2"),)
IN_TWO_PARTS = (Example((1, 5, 6), (0, 0, 1), "a:3"), Example((5, 7), (0, 1), "a:3"))


def test_rows_give_the_examples_back():
    records = [WHOLE, LEARNED_TWICE, IN_TWO_PARTS]
    assert [as_examples(row) for row in as_table(records).to_pylist()] == records
    assert as_table([]).num_rows == 0


def test_the_length_of_a_row_is_that_of_all_its_examples():
    assert as_table([IN_TWO_PARTS, WHOLE, (IN_TWO_PARTS[0],)])["length"].to_pylist() == [3 + 2, 5, 3]


def test_only_rows_with_equal_ids_learn_marks_and_ends_are_copies():
    assert copies_in(datasets.Dataset(as_table([WHOLE, LEARNED_TWICE, IN_TWO_PARTS]))) == 0
    assert copies_in(datasets.Dataset(as_table([WHOLE, IN_TWO_PARTS, WHOLE, IN_TWO_PARTS, WHOLE]))) == 3
    assert copies_in(datasets.Dataset(as_table([]))) == 0
