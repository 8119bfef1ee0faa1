"""Shared prefix: how much two sequences begin alike."""

from collections.abc import Sequence


def shared_length(first: Sequence[object], second: Sequence[object], *, start: int = 0) -> int:
    """How many items two sequences begin with alike, which are known to agree before `start`."""
    shorter = min(len(first), len(second))
    while start < shorter and first[start] == second[start]:
        start += 1
    return start


def shared_characters(first: str, second: str) -> int:
    """The same for two texts, by halves.

    Slices of a text are compared as one piece of memory: for 1,500 shared characters of 2,000 that takes 2 µs, and one
    character after the other 50 to 100. Slices of ids are copied item by item, so for them it saves nothing.
    """
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
