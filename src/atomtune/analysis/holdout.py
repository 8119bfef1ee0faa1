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
    """(rows to learn, rows to hold out): whole groups, drawn by the seed, as near to count as they allow.

    A group that would overshoot is passed over, unless nothing has been drawn when all are tried: then the smallest is.
    """
    members = _members(groups)
    order = list(range(len(members)))
    random.Random(seed).shuffle(order)
    held: list[int] = []
    for one in order:
        if len(held) + len(members[one]) <= count:
            held += members[one]
    if not held:
        held = members[min(order, key=lambda one: len(members[one]))]
    apart = set(held)
    return [row for row in range(len(groups)) if row not in apart], sorted(held)


def _members(groups: Numbers) -> list[list[int]]:
    order = numpy.argsort(groups, kind="stable")
    cuts = numpy.flatnonzero(numpy.diff(groups[order])) + 1
    return [part.tolist() for part in numpy.split(order, cuts)]


def overlapping(groups: Numbers, learned: int) -> list[int]:
    """Of groups over learned rows and then others: which of the others are like a learned one, counted from 0."""
    seen = set(groups[:learned].tolist())
    return [at for at, group in enumerate(groups[learned:].tolist()) if group in seen]
