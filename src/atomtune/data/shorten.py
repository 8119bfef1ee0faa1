"""Shorten: what of a record's prompt goes first when an example would be too long.

The oldest turns, then the start of the longest prompt text. The template's markers and the answer are not touched.
"""

from collections.abc import Callable
from dataclasses import replace

from atomtune.data.records import Record


def shorten(record: Record, fits: Callable[[Record], bool]) -> Record | None:
    """Drop the oldest turns, then the start of the longest prompt text, until the record fits; None if it cannot."""
    system = tuple(turn for turn in record.prompt if turn.role == "system")
    rest = [turn for turn in record.turns if turn.role != "system"]
    while len(rest) > 2:  # the last question and the answer stay
        later = next((i for i, turn in enumerate(rest[1:-1], start=1) if turn.role == "user"), len(rest))
        if later > len(rest) - 2:
            break
        rest = rest[later:]
        record = replace(record, turns=(*system, *rest))
        if fits(record):
            return record
    for _ in range(2 * len(record.prompt)):
        index, name, text = _longest_text(record)
        if not text:
            break
        if not fits(_with_text(record, index, name, "")):
            record = _with_text(record, index, name, "")
            continue
        low, high = 0, 8  # keeping `low` characters fits, keeping `high` is not known to
        while high < len(text) and fits(_with_text(record, index, name, text[-high:])):
            low, high = high, high * 2
        high = min(high, len(text))
        while high - low > 1:
            middle = (low + high) // 2
            if fits(_with_text(record, index, name, text[-middle:])):
                low = middle
            else:
                high = middle
        return _with_text(record, index, name, text[-low:] if low else "")
    return record if fits(record) else None


def _longest_text(record: Record) -> tuple[int, str, str]:
    texts = [(i, name, getattr(turn, name)) for i, turn in enumerate(record.prompt) for name in ("text", "input")]
    return max(texts, key=lambda entry: len(entry[2]))


def _with_text(record: Record, index: int, name: str, text: str) -> Record:
    turns = list(record.turns)
    turn = turns[index]
    turns[index] = replace(turn, text=text) if name == "text" else replace(turn, input=text)
    return replace(record, turns=tuple(turns))
