"""Hold-out split: records to evaluate on, none of which is nearly equal to a record that is learned.

A split that separates two equal questions, or a record and its near copy, measures what was learned by heart.
"""

import random

import numpy

from atomtune.analysis.near_duplicates import Numbers, joined
from atomtune.analysis.texts import Texts


def alike(texts: Texts) -> Numbers:
    """A group for each record: those with nearly equal texts or equal prompts share one."""
    return joined(texts.near, texts.prompts)


def held_out(groups: Numbers, count: int, *, seed: int) -> tuple[list[int], list[int]]:
    """(rows to learn, rows to hold out): whole groups in an order drawn by the seed, at most `count` rows together.

    A group that is too large for the room left is passed over. Where every group is, the smallest is held out.

    groups  [N]  the group of each row
    """
    shuffled = _members(groups)
    random.Random(seed).shuffle(shuffled)
    rows_held_out: list[int] = []
    for rows in shuffled:
        if len(rows_held_out) + len(rows) <= count:
            rows_held_out += rows
    if not rows_held_out:
        rows_held_out = min(shuffled, key=len)
    apart = set(rows_held_out)
    rows_to_learn = [row for row in range(len(groups)) if row not in apart]
    return rows_to_learn, sorted(rows_held_out)


def _members(groups: Numbers) -> list[list[int]]:
    """The rows of each group, in ascending order."""
    by_group = numpy.argsort(groups, kind="stable")  # [N] rows, those of a group together
    begins = numpy.flatnonzero(numpy.diff(groups[by_group])) + 1  # where the next group begins
    return [rows.tolist() for rows in numpy.split(by_group, begins)]


def overlapping(groups: Numbers, learned: int) -> list[int]:
    """Which rows behind the first `learned` share a group with one of those, counted from the first behind them."""
    learned_groups = set(groups[:learned].tolist())
    other_groups = groups[learned:].tolist()
    return [row for row, group in enumerate(other_groups) if group in learned_groups]
