"""Shared beginnings: long beginnings that many texts have in common, and the texts without them.

Ten thousand questions after one instruction of 400 characters are not near-duplicates because of that instruction.
"""

import itertools
from collections.abc import Sequence

#: A shorter beginning is no instruction, it is how people begin a sentence.
LEAST_CHARACTERS = 32
#: A beginning that fewer texts share is a group of near-equal records, not a task; and of how many texts it is told.
LEAST_SHARE, LEAST_TEXTS = 0.02, 20


def trunks_of(texts: Sequence[str]) -> tuple[str, ...]:
    """Beginnings that many of the texts share, the longer of two nested ones first."""
    enough = max(LEAST_TEXTS, LEAST_SHARE * len(texts))
    found: list[str] = []
    waiting = [(sorted(texts), 0)]
    while waiting:
        group, known = waiting.pop()
        for run in _runs(group, known + LEAST_CHARACTERS):
            if len(run) >= enough:
                trunk = _shared(run[0], run[-1])  # sorted: what these share, all between them share
                found.append(trunk)
                waiting.append((run, len(trunk)))
    return tuple(sorted(found, key=len, reverse=True))


def _runs(ordered: Sequence[str], characters: int) -> list[list[str]]:
    """Stretches of sorted texts that agree in so many first characters."""
    long_enough = (text for text in ordered if len(text) >= characters)
    return [list(run) for _, run in itertools.groupby(long_enough, key=lambda text: text[:characters])]


def _shared(first: str, last: str) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(one for one, _ in same)


def without_trunk(text: str, trunks: Sequence[str]) -> str:
    """The text behind the longest trunk it begins with; the whole of it where nothing would be left."""
    trunk = next((one for one in trunks if text.startswith(one)), "")
    return text[len(trunk) :] or text
