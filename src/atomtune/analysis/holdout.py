"""Hold-out split: records for evaluation, none of which is a near-duplicate of a training record.

A split that puts equal questions, or a record and its near-duplicate, on both sides measures memorization.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
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


def held_out(groups: Numbers, files: Numbers, quotas: Sequence[int], *, seed: int) -> Split:
    """Hold out whole groups, in random order, up to each file's quota. A group that no longer fits is skipped.

    A group that exceeds a quota by itself is learned whole. A quota therefore shrinks by the share of the file's rows
    that are in such groups; otherwise all other rows might be held out, and the run would learn none of them.
    If no group fits at all, the smallest one is held out.

    groups  [N]  the group of each row
    files   [N]  the file of each row
    quotas  [F]  rows to hold out of each file; of one with quota 0, none is held out
    """
    file_of = files.tolist()
    counted = [(rows, Counter(file_of[row] for row in rows)) for rows in _members(groups)]
    random.Random(seed).shuffle(counted)
    fitting = [(rows, counts) for rows, counts in counted if all(quotas[file] >= counts[file] for file in counts)]
    room = _fair(quotas, numpy.bincount(files, minlength=len(quotas)).tolist(), (counts for _, counts in fitting))
    wanted = sum(room) if fitting else sum(quotas)
    rows_held_out: list[int] = []
    for rows, counts in fitting:
        if all(room[file] >= counts[file] for file in counts):
            rows_held_out += rows
            room = [left - counts[file] for file, left in enumerate(room)]
    if not rows_held_out:
        rows_held_out = min(
            (rows for rows, counts in counted if all(quotas[file] for file in counts)), key=len, default=[]
        )
    apart = set(rows_held_out)
    rows_to_learn = [row for row in range(len(groups)) if row not in apart]
    return Split(rows_to_learn, sorted(rows_held_out), wanted)


def _fair(quotas: Sequence[int], lengths: Sequence[int], fitting: Iterable[Counter[int]]) -> list[int]:
    """[F] The quotas, each times the share of the file's rows that are in groups that can be held out."""
    apart: Counter[int] = Counter()
    for counts in fitting:
        apart.update(counts)
    return [
        quota * apart[file] // length if length else 0
        for file, (quota, length) in enumerate(zip(quotas, lengths, strict=True))
    ]


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
