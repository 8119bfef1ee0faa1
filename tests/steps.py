"""How much work a call is, counted instead of timed: the number on a busy machine is that on an idle one."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class Counted(str):
    """A text that counts how often any of its kind is compared: the number that a search in C code takes."""

    __slots__ = ()
    comparisons = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return str.__eq__(self, other)


def steps_of(call: Callable[..., object], *arguments: Any, **named: Any) -> int:
    """The number of lines of Python that a call executes. A line counts once, however much C code does within it."""
    steps = 0

    def count(_frame: FrameType, event: str, _argument: Any) -> Callable[..., Any]:
        nonlocal steps
        steps += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        call(*arguments, **named)
    finally:
        sys.settrace(before)
    return steps
