"""Shared beginnings: long prefixes that many texts have in common, and the texts without them.

Ten thousand questions that begin with the same instruction of 400 characters are not near-duplicates.
"""

import itertools
from collections.abc import Sequence

from atomtune.shared_prefix import shared_characters

#: A shorter prefix is just a common way to begin a sentence.
LEAST_CHARACTERS = 32
#: A prefix counts if at least this many texts have it, of the 1,000 in which it is searched; fewer may be
#: near-duplicates.
LEAST_TEXTS = 20


def beginnings_of(texts: Sequence[str]) -> tuple[str, ...]:
    """The prefixes that many of the texts share, longest first."""
    beginnings: list[str] = []
    # Sorting puts texts with an equal prefix next to each other, so each prefix is one stretch of them. Each stretch is
    # searched again after its prefix, as part of it may share a longer one.
    waiting = [(sorted(texts), 0)]
    while waiting:
        group, known_characters = waiting.pop()
        for stretch in _stretches(group, known_characters + LEAST_CHARACTERS):
            if len(stretch) < LEAST_TEXTS:
                continue
            # In sorted texts, all texts between the first and the last share what these two share.
            beginning = stretch[0][: shared_characters(stretch[0], stretch[-1])]
            beginnings.append(beginning)
            waiting.append((stretch, len(beginning)))
    return tuple(sorted(beginnings, key=len, reverse=True))


def without_beginning(text: str, beginnings: Sequence[str]) -> str:
    """The text without the longest of these prefixes that it has; the whole text if nothing would be left."""
    for beginning in beginnings:  # longest first
        if text.startswith(beginning):
            return text[len(beginning) :] or text
    return text


def _stretches(ordered: Sequence[str], characters: int) -> list[list[str]]:
    """Group sorted texts by their first `characters` characters; shorter texts are left out."""
    long_enough = [text for text in ordered if len(text) >= characters]
    by_beginning = itertools.groupby(long_enough, key=lambda text: text[:characters])
    return [list(stretch) for _, stretch in by_beginning]
