"""Hold-out split: records for evaluation, none of which is a near-duplicate of a training record.

A split that puts equal questions, or a record and its near-duplicate, on both sides measures memorization.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy

from atomtune.analysis.near_duplicates import Numbers, joined
from atomtune.analysis.texts import Texts


def alike(texts: Texts) -> Numbers:
    """A group for each of N records, [N]: near-duplicates and records with equal prompts share one."""
    return joined(texts.near, texts.prompts)


class Split(NamedTuple):
    """Rows to learn and rows to hold out, both in ascending order, and how many were to be held out."""

    learned: list[int]
    held_out: list[int]
    wanted: int


def held_out(groups: Numbers, files: Numbers, quotas: Sequence[int], *, is_asked_for: bool, seed: int) -> Split:
    """Hold out whole groups, in random order, up to each file's quota. A group that no longer fits is skipped.

    A group that exceeds a quota by itself is learned whole. A quota therefore shrinks by the share of the file's rows
    that are in such groups; otherwise all other rows might be held out, and the run would learn none of them. A quota
    that the user has asked for shrinks only to half of those other rows.
    If no group fits at all, the smallest one is held out.

    groups  [N]  the group of each row
    files   [N]  the file of each row
    quotas  [F]  rows to hold out of each file; of one with quota 0, none is held out
    """
    file_of = files.tolist()
    # The rows of each group, and how many of them each file has.
    counted = [(rows, Counter(file_of[row] for row in rows)) for rows in _members(groups)]
    random.Random(seed).shuffle(counted)
    fitting = [(rows, counts) for rows, counts in counted if _fits(counts, quotas)]
    room = _room(files, quotas, [counts for _, counts in fitting], is_asked_for=is_asked_for)
    wanted = sum(room) if fitting else sum(quotas)
    rows_held_out: list[int] = []
    for rows, counts in fitting:
        if _fits(counts, room):
            rows_held_out += rows
            room = [left - counts[file] for file, left in enumerate(room)]
    if not rows_held_out:
        allowed = [rows for rows, counts in counted if all(quotas[file] for file in counts)]
        rows_held_out = min(allowed, key=len, default=[])
    are_held_out = set(rows_held_out)
    learned = [row for row in range(len(groups)) if row not in are_held_out]
    return Split(learned, sorted(rows_held_out), wanted)


def _fits(counts: Counter[int], room: Sequence[int]) -> bool:
    """Whether there is room for all rows of a group: file → their number."""
    return all(room[file] >= count for file, count in counts.items())


def _room(files: Numbers, quotas: Sequence[int], fitting: Sequence[Counter[int]], *, is_asked_for: bool) -> list[int]:
    """[F] The quotas, smaller for files with rows in groups that cannot be held out.

    fitting  the counts of the groups that can
    """
    lengths = numpy.bincount(files, minlength=len(quotas)).tolist()
    can_be_held_out: Counter[int] = Counter()  # file → number of rows
    for counts in fitting:
        can_be_held_out.update(counts)
    room = list(quotas)
    for file, quota in enumerate(quotas):
        rows = can_be_held_out[file]
        if rows < lengths[file]:
            room[file] = min(quota, rows // 2) if is_asked_for else quota * rows // lengths[file]
    return room


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
