"""Shortening: what of a record's prompt goes first when an example would be too long.

The oldest turns, then the start of the longest prompt text. The template's markers and the answer are not touched, and
something of the question that is answered always stays.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from atomtune.data.records import Record, Turn

#: A turn's number, and which of its texts: `text` or `input`.
Place = tuple[int, str]


def shorten(record: Record, fits: Callable[[Record], bool], *, share: float = 0.0) -> Record | None:
    """Drop the oldest turns, then the start of the longest prompt text, until the record fits; None if it cannot.

    record  does not fit as it is
    fits    is taken to hold for less where it holds for more, so that few lengths are tried
    share   about how much of the prompt fits: where the search begins
    """
    asks_something = _asks_something(record)
    record, fitting = _without_oldest(record, fits, share)
    if fitting:
        return record
    for _ in range(2 * len(record.prompt)):
        place, text = _longest_text(record)
        if not text:
            return None
        blank = _with_text(record, place, "")
        if fits(blank):
            record = _with_end_of_text(record, place, text, fits, share)
            return record if _asks_something(record) >= asks_something else None
        record = blank
    return record if fits(record) and _asks_something(record) >= asks_something else None


def _asks_something(record: Record) -> bool:
    """Whether anything is left of the last question, where the record has one."""
    questions = [turn for turn in record.prompt if turn.role == "user"]
    return not questions or bool((questions[-1].text + questions[-1].input).strip())


def _without_oldest(record: Record, fits: Callable[[Record], bool], share: float) -> tuple[Record, bool]:
    """The record from one of its later questions on, and whether it fits: the longest that does, else the shortest."""
    system = tuple(turn for turn in record.prompt if turn.role == "system")
    rest = [turn for turn in record.turns if turn.role != "system"]
    starts = [i for i, turn in enumerate(rest[:-1]) if i and turn.role == "user"]  # the last question stays

    def last(exchanges: int) -> Record:
        return replace(record, turns=(*system, *rest[starts[-exchanges] :]))

    if not starts:
        return record, False
    likely = _likely_number(rest, starts, share)
    most = _most(lambda exchanges: fits(last(exchanges)), 0, len(starts) + 1, likely=likely)
    return (last(most), True) if most else (last(1), False)


def _likely_number(turns: Sequence[Turn], starts: Sequence[int], share: float) -> int:
    """How many of the last exchanges, which begin at starts, hold about this share of all text."""
    through = list(itertools.accumulate(map(_characters, turns)))
    room = share * through[-1]
    return sum(through[-1] - through[start - 1] <= room for start in starts)


def _characters(turn: Turn) -> int:
    return len(turn.text) + len(turn.input)


def _with_end_of_text(record: Record, place: Place, text: str, fits: Callable[[Record], bool], share: float) -> Record:
    """The record with as much of the end of a text as fits; nothing of it is known to."""

    def ending(characters: int) -> Record:
        return _with_text(record, place, text[len(text) - characters :])

    return ending(_most(lambda characters: fits(ending(characters)), 0, len(text), likely=int(len(text) * share)))


def _most(holds: Callable[[int], bool], low: int, high: int, *, likely: int) -> int:
    """The largest number that holds, from low, which does, to below high, which does not.

    In steps that double from the likely number on, then by halving: what is tried is never much more than what is kept.
    """
    number, step = max(likely, low + 1), 1
    if number < high and holds(number):
        low = number
        while low + step < high and holds(low + step):
            low, step = low + step, 2 * step
        high = min(high, low + step)
    else:
        high = min(high, number)
        while high - step > low and not holds(high - step):
            high, step = high - step, 2 * step
        low = max(low, high - step)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def _longest_text(record: Record) -> tuple[Place, str]:
    texts = [((i, name), getattr(turn, name)) for i, turn in enumerate(record.prompt) for name in ("text", "input")]
    return max(texts, key=lambda entry: len(entry[1]))


def _with_text(record: Record, place: Place, text: str) -> Record:
    index, name = place
    turns = list(record.turns)
    turns[index] = replace(turns[index], text=text) if name == "text" else replace(turns[index], input=text)
    return replace(record, turns=tuple(turns))
