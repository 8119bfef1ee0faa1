"""Shortening: what of a record's prompt goes first when an example would be too long.

The oldest exchanges; behind the question that is left, the oldest calls of tools with what they brought; then the start
of the longest prompt text. The template's markers and the answer are not touched, and something of the question that is
answered always stays.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from atomtune.data.records import Record, Turn

#: A turn's number, and which of its texts: `text` or `input`.
Place = tuple[int, str]


def shorten(record: Record, fits: Callable[[Record], bool], *, share: float = 0.0) -> Record | None:
    """Drop the oldest turns, then the start of the longest prompt text, until the record fits; None if it cannot.

    Of an agent's record, which is one question and many calls, the question stays, and the last calls with it.

    record  does not fit as it is
    fits    is taken to hold for less where it holds for more, so that few lengths are tried
    share   about how much of the prompt fits: where the search begins
    """
    record_asks = _asks_something(record)
    record, is_short_enough = _fewest_turns(record, fits, share)
    if is_short_enough:
        return record
    shortened = _with_shorter_texts(record, fits, share)
    if shortened is None:
        return None
    if record_asks and not _asks_something(shortened):
        return None  # an answer to nothing is not trained on
    return shortened


def without_oldest(record: Record, fits: Callable[[Record], bool], *, share: float = 0.0) -> Record | None:
    """`shorten` as far as it drops whole turns; None where that is not enough."""
    shorter, is_short_enough = _fewest_turns(record, fits, share)
    return shorter if is_short_enough else None


def _fewest_turns(record: Record, fits: Callable[[Record], bool], share: float) -> tuple[Record, bool]:
    """The record without its oldest turns, and whether it fits: the longest that does, else the shortest."""
    for cuts in (_at_questions, _at_calls):
        record, is_short_enough = _from_a_cut(record, cuts(record), fits, share)
        if is_short_enough:
            return record, True
    return record, False


def _asks_something(record: Record) -> bool:
    """Whether anything is left of the last question, where the record has one."""
    questions = [turn for turn in record.prompt if turn.role == "user"]
    if not questions:
        return True
    return bool((questions[-1].text + questions[-1].input).strip())


def _with_shorter_texts(record: Record, fits: Callable[[Record], bool], share: float) -> Record | None:
    """The record with the longest prompt text blanked, then the next, and of the last of them as much as fits."""
    for _ in range(2 * len(record.prompt)):  # a turn has two texts
        place, text = _longest_text(record)
        if not text:
            return None
        blank = _with_text(record, place, "")
        if fits(blank):
            return _with_end_of_text(record, place, text, fits, share)
        record = blank
    return record if fits(record) else None


class _Cuts(NamedTuple):
    """Where a record may begin instead: its turns are `stays`, and `rest` from one of `starts` on."""

    stays: tuple[Turn, ...]
    rest: tuple[Turn, ...]
    starts: list[int]


def _at_questions(record: Record) -> _Cuts:
    """At each later question."""
    # turns    user  assistant  user  assistant  user  assistant
    # starts                    2                4                the later exchanges; 0 would be the whole record
    system, others = _system_apart(record)
    return _Cuts(system, others, [i for i, turn in enumerate(others[:-1]) if i and turn.role == "user"])


def _at_calls(record: Record) -> _Cuts:
    """At each later turn of the assistant before the answer; what stands before its first one stays."""
    # turns    user  assistant  tool  assistant  tool  assistant
    # rest           0          1     2          3     4           starts: 2; 4 is the answer
    system, others = _system_apart(record)
    first = next((i for i, turn in enumerate(others) if turn.role == "assistant"), 0)
    rest = others[first:]
    starts = [i for i, turn in enumerate(rest[:-1]) if i and turn.role == "assistant"]
    return _Cuts((*system, *others[:first]), rest, starts)


def _system_apart(record: Record) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """System texts, which stay, and the other turns."""
    system = tuple(turn for turn in record.turns if turn.role == "system")
    return system, tuple(turn for turn in record.turns if turn.role != "system")


def _from_a_cut(record: Record, cuts: _Cuts, fits: Callable[[Record], bool], share: float) -> tuple[Record, bool]:
    """The record from one of its cuts on, and whether it fits: the longest that does, else the shortest."""
    stays, rest, starts = cuts
    if not starts:
        return record, False

    def with_last(number: int) -> Record:
        return replace(record, turns=(*stays, *rest[starts[-number] :]))

    most = _most(
        lambda number: fits(with_last(number)),
        low=0,
        high=len(starts) + 1,  # all: the record, which does not fit
        likely=_likely_number(rest, starts, share),
    )
    if most == 0:
        return with_last(1), False
    return with_last(most), True


def _likely_number(turns: Sequence[Turn], starts: Sequence[int], share: float) -> int:
    """How many of the last parts, which begin at starts, hold about this share of all text."""
    through = list(itertools.accumulate(map(_characters, turns)))  # [turns] characters up to and with each
    total = through[-1]
    from_starts = [total - through[start - 1] for start in starts]
    return sum(characters <= share * total for characters in from_starts)


def _characters(turn: Turn) -> int:
    return len(turn.text) + len(turn.input)


def _with_end_of_text(record: Record, place: Place, text: str, fits: Callable[[Record], bool], share: float) -> Record:
    """The record with as much of the end of a text as fits; nothing of it is known to."""

    def ending(characters: int) -> Record:
        return _with_text(record, place, text[len(text) - characters :])

    most = _most(lambda characters: fits(ending(characters)), low=0, high=len(text), likely=int(len(text) * share))
    return ending(most)


def _most(holds: Callable[[int], bool], *, low: int, high: int, likely: int) -> int:
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
