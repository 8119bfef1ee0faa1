"""Hold-out split: records for evaluation, none of which is a near-duplicate of a training record.

A split that puts equal questions, or a record and its near-duplicate, on both sides measures memorization.
"""

import random

import numpy

from atomtune.analysis.near_duplicates import Numbers, joined
from atomtune.analysis.texts import Texts


def alike(texts: Texts) -> Numbers:
    """A group for each of N records, [N]: near-duplicates and records with equal prompts share one."""
    return joined(texts.near, texts.prompts)


def held_out(groups: Numbers, count: int, *, seed: int) -> tuple[list[int], list[int]]:
    """Split the rows into (rows to learn, rows to hold out), both in ascending order.

    Whole groups are held out, in random order, up to `count` rows. A group that no longer fits is skipped. If no group
    fits at all, the smallest one is held out.

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
    by_group = numpy.argsort(groups, kind="stable")  # [N] rows, sorted by group
    begins = numpy.flatnonzero(numpy.diff(groups[by_group])) + 1  # start of each group but the first
    return [rows.tolist() for rows in numpy.split(by_group, begins)]


def overlapping(groups: Numbers, learned: int) -> list[int]:
    """The rows after the first `learned` that share a group with one of these; row `learned` is number 0."""
    learned_groups = set(groups[:learned].tolist())
    other_groups = groups[learned:].tolist()
    return [row for row, group in enumerate(other_groups) if group in learned_groups]
