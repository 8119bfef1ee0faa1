"""Shared beginnings: long beginnings that many texts have in common, and the texts without them.

Ten thousand questions after one instruction of 400 characters are not near-duplicates because of that instruction.
"""

import itertools
from collections.abc import Sequence

from atomtune.shared_prefix import shared_characters

#: A shorter beginning is no instruction, it is how people begin a sentence.
LEAST_CHARACTERS = 32
#: A beginning is a task's where so many of the texts have it, as a share and as a number; fewer are near-equal records.
LEAST_SHARE, LEAST_TEXTS = 0.02, 20


def beginnings_of(texts: Sequence[str]) -> tuple[str, ...]:
    """Beginnings that many of the texts share, the longer of two nested ones first."""
    enough = max(LEAST_TEXTS, LEAST_SHARE * len(texts))
    beginnings: list[str] = []
    # Sorting puts texts with an equal beginning next to each other, so each beginning is one stretch of them. A stretch
    # is looked through again behind what it shares: a longer beginning may be nested in it.
    waiting = [(sorted(texts), 0)]
    while waiting:
        group, known_characters = waiting.pop()
        for stretch in _stretches(group, known_characters + LEAST_CHARACTERS):
            if len(stretch) < enough:
                continue
            # In sorted texts, what the first and the last share, all between them share.
            beginning = stretch[0][: shared_characters(stretch[0], stretch[-1])]
            beginnings.append(beginning)
            waiting.append((stretch, len(beginning)))
    return tuple(sorted(beginnings, key=len, reverse=True))


def without_beginning(text: str, beginnings: Sequence[str]) -> str:
    """The text behind the longest of these that it begins with; the whole of it where nothing would be left."""
    for beginning in beginnings:  # the longest first
        if text.startswith(beginning):
            return text[len(beginning) :] or text
    return text


def _stretches(ordered: Sequence[str], characters: int) -> list[list[str]]:
    """Sorted texts in stretches that agree in so many first characters; shorter texts are left out."""
    long_enough = [text for text in ordered if len(text) >= characters]
    by_beginning = itertools.groupby(long_enough, key=lambda text: text[:characters])
    return [list(stretch) for _, stretch in by_beginning]
