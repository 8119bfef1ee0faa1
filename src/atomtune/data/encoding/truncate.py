"""Shortening: what is removed from a record's prompt when an example would be too long.

First the oldest exchanges; then, after the question that remains, the oldest tool calls with their results; then the
start of the longest prompt text. The template's markers and the answer are never touched, and some of the question that
is answered always remains.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from atomtune.data.records import Record, Turn

#: Index of a turn, and the name of one of its two texts: `text` or `input`.
Place = tuple[int, str]


def shorten(record: Record, fits: Callable[[Record], bool], *, share: float = 0.0) -> Record | None:
    """Drop the oldest turns, then the start of the longest prompt text, until the record fits; None if it cannot.

    An agent's record, one question and many tool calls, keeps the question and the last calls.

    record  does not fit as it is
    fits    assumed monotonic: if a record fits, so does a shorter one. This keeps the number of attempts small.
    share   estimated fraction of the prompt that fits: the start of the search
    """
    record_asks = _asks_something(record)
    record, is_short_enough = _fewest_turns(record, fits, share)
    if is_short_enough:
        return record
    shortened = _with_shorter_texts(record, fits, share)
    if shortened is None:
        return None
    if record_asks and not _asks_something(shortened):
        return None  # nothing is left of the question
    return shortened


def without_oldest(record: Record, fits: Callable[[Record], bool], *, share: float = 0.0) -> Record | None:
    """Like `shorten`, but drop whole turns only; None if that is not enough."""
    shorter, is_short_enough = _fewest_turns(record, fits, share)
    return shorter if is_short_enough else None


def _fewest_turns(record: Record, fits: Callable[[Record], bool], share: float) -> tuple[Record, bool]:
    """Drop as few of the oldest turns as needed, or all that may be dropped; also returns whether the record fits."""
    for find_droppable in (_at_questions, _at_calls):
        record, is_short_enough = _drop_oldest(record, find_droppable(record), fits, share)
        if is_short_enough:
            return record, True
    return record, False


def _asks_something(record: Record) -> bool:
    """Whether the last question has any text; True for a record without questions."""
    questions = [turn for turn in record.prompt if turn.role == "user"]
    if not questions:
        return True
    return bool((questions[-1].text + questions[-1].input).strip())


def _with_shorter_texts(record: Record, fits: Callable[[Record], bool], share: float) -> Record | None:
    """Blank the longest prompt text, then the next, until the record fits; of the last one, keep as much as fits.

    None if all texts are blank and the record still does not fit.
    """
    for _ in range(2 * len(record.prompt)):  # each turn has two texts
        place, text = _longest_text(record)
        if not text:
            return None
        blank = _with_text(record, place, "")
        if fits(blank):
            return _with_end_of_text(record, place, text, fits, share)
        record = blank
    return None


class _Droppable(NamedTuple):
    """The ways to shorten a record: its turns become `stays` and `rest[start:]`, for a start in `starts`."""

    stays: tuple[Turn, ...]
    rest: tuple[Turn, ...]
    starts: list[int]


def _at_questions(record: Record) -> _Droppable:
    """What may be dropped: all before a question, but not before the first one."""
    # rest     user  assistant  user  assistant  user  assistant
    # starts                    2                4                 0 would be the whole record
    system, others = _system_apart(record)
    return _Droppable(system, others, [i for i, turn in enumerate(others[:-1]) if i and turn.role == "user"])


def _at_calls(record: Record) -> _Droppable:
    """What may be dropped: all before an assistant turn other than the answer; the turns before the first one stay."""
    # turns    user  assistant  tool  assistant  tool  assistant
    # rest           0          1     2          3     4           4 is the answer
    # starts                          2
    system, others = _system_apart(record)
    first = next((i for i, turn in enumerate(others) if turn.role == "assistant"), 0)
    rest = others[first:]
    starts = [i for i, turn in enumerate(rest[:-1]) if i and turn.role == "assistant"]
    return _Droppable((*system, *others[:first]), rest, starts)


def _system_apart(record: Record) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """The system turns, which are kept, and the other turns."""
    system = tuple(turn for turn in record.turns if turn.role == "system")
    return system, tuple(turn for turn in record.turns if turn.role != "system")


def _drop_oldest(
    record: Record, droppable: _Droppable, fits: Callable[[Record], bool], share: float
) -> tuple[Record, bool]:
    """The record with as few turns dropped as needed, else with all that may be; also returns whether it fits."""
    stays, rest, starts = droppable
    if not starts:
        return record, False

    def with_last(number: int) -> Record:
        return replace(record, turns=(*stays, *rest[starts[-number] :]))

    most = _most(
        lambda number: fits(with_last(number)),
        high=len(starts) + 1,  # the whole record, which does not fit
        likely=_likely_number(rest, starts, share),
    )
    if most == 0:
        return with_last(1), False
    return with_last(most), True


def _likely_number(turns: Sequence[Turn], starts: Sequence[int], share: float) -> int:
    """How many of the last parts, which begin at `starts`, have about this share of all characters."""
    through = list(itertools.accumulate(map(_characters, turns)))  # [turns] characters up to and including each turn
    total = through[-1]
    from_starts = [total - through[start - 1] for start in starts]
    return sum(characters <= share * total for characters in from_starts)


def _characters(turn: Turn) -> int:
    return len(turn.text) + len(turn.input)


def _with_end_of_text(record: Record, place: Place, text: str, fits: Callable[[Record], bool], share: float) -> Record:
    """The record with as much of the end of the text as fits; without the text it is known to fit."""

    def ending(characters: int) -> Record:
        return _with_text(record, place, text[len(text) - characters :])

    most = _most(lambda characters: fits(ending(characters)), high=len(text), likely=int(len(text) * share))
    return ending(most)


def _most(holds: Callable[[int], bool], *, high: int, likely: int) -> int:
    """The largest number in [0, high) for which `holds`; 0 is assumed to hold, and `high` not to.

    Starts at `likely` with doubling steps, then bisects, so that no attempt is much larger than the result.
    """
    low, number, step = 0, max(likely, 1), 1
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
    texts: list[tuple[Place, str]] = []
    for i, turn in enumerate(record.prompt):
        texts.append(((i, "text"), turn.text))
        texts.append(((i, "input"), turn.input))
    return max(texts, key=lambda place_and_text: len(place_and_text[1]))


def _with_text(record: Record, place: Place, text: str) -> Record:
    index, name = place
    turns = list(record.turns)
    if name == "text":
        turns[index] = replace(turns[index], text=text)
    else:
        turns[index] = replace(turns[index], input=text)
    return replace(record, turns=tuple(turns))
