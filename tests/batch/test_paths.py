"""Paths: stretches of a row, compared with the lists of their tokens."""

from itertools import pairwise

from atomtune.batch.paths import Stretch, last_of, path_to, split_at
from atomtune.batch.row import segments
from atomtune.batch.tree import graft
from tests.batch.test_row import path_of
from tests.batch.test_tree import forests


def tokens_of(path: list[Stretch]) -> list[int]:
    return [token for start, end in path for token in range(start, end)]


def test_a_path_has_all_tokens_from_the_root_in_as_few_stretches_as_possible():
    for examples in forests()[:200]:
        row = graft(examples, least_saved=1)
        parts = segments(row)
        for number, part in enumerate(parts):
            path = path_to(parts, number)
            assert tokens_of(path) == path_of(row, part.end - 1)[::-1]
            assert all(end < start for (_, end), (start, _) in pairwise(path)), "adjacent stretches are one"


def test_a_path_is_cut_anywhere_without_losing_a_token():
    path = [(0, 3), (5, 6), (9, 13)]
    every = tokens_of(path)
    for count in range(-1, len(every) + 2):
        kept = max(0, count)
        first, others = split_at(path, count)
        assert (tokens_of(first), tokens_of(others)) == (every[:kept], every[kept:])
        assert tokens_of(last_of(path, count)) == every[len(every) - min(kept, len(every)) :]
