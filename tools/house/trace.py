"""Run one atomtune command in this process and record which of atomtune's functions it enters, in order.

    python -m tools.house.trace OUT.json train --model_path …

OUT.json has the exit code, the functions by first entry, `entries` (every change of function, as indices into that
list) and `holders`: the functions that had TRACED_VALUE in a variable, at most TRACED_DEPTH levels deep, and
their callers.
"""

import json
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

Function = tuple[str, str]  # file under src/atomtune, name of the function or method


class Tracer:
    """A profile function that records calls of the functions in one folder."""

    def __init__(self, source: Path, value: str = "", depth: int = 0) -> None:
        self.prefix = f"{source}{os.sep}"
        self.value = value
        self.depth = depth
        self.numbers: dict[Function, int] = {}
        self.entries: list[int] = []
        self.holders: set[int] = set()

    def __call__(self, frame: FrameType, event: str, _result: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(self.prefix):
            return
        if code.co_name.startswith("<"):
            return  # comprehensions and lambdas belong to the function around them
        function = self.function_of(code)
        if function not in self.numbers:
            if self.is_importing(frame):
                return
            self.numbers[function] = len(self.numbers)
        number = self.numbers[function]
        if not self.entries or self.entries[-1] != number:
            self.entries.append(number)
        if self.value and number not in self.holders and self.holds(list(frame.f_locals.values()), self.depth + 1):
            self.holders |= {number, *self.callers(frame)}

    def function_of(self, code: CodeType) -> Function:
        """The function of a code object; an inner function counts as the function around it."""
        file = code.co_filename.removeprefix(self.prefix).replace(os.sep, "/")
        return file, code.co_qualname.partition(".<locals>")[0]

    def is_importing(self, frame: FrameType) -> bool:
        """Whether one of our modules is being imported up the stack: decorators and field() are not part of a walk."""
        above = frame.f_back
        while above is not None:
            if above.f_code.co_name == "<module>" and above.f_code.co_filename.startswith(self.prefix):
                return True
            above = above.f_back
        return False

    def callers(self, frame: FrameType) -> list[int]:
        """Indices of our functions further up the stack."""
        numbers = []
        while (above := frame.f_back) is not None:
            number = self.numbers.get(self.function_of(above.f_code))
            if number is not None:
                numbers.append(number)
            frame = above
        return numbers

    def holds(self, value: Any, depth: int) -> bool:
        """Whether the value is the traced one, or contains it at most `depth` levels deep."""
        if type(value) in (str, int, bytes):
            return self.is_value(value)
        if depth == 0:
            return False
        if type(value) in (list, tuple):
            parts: Iterable[Any] = value[:100]
        elif type(value) is dict:
            parts = list(value.values())[:100]
        elif isinstance(value, Exception):
            parts = value.args
        elif type(value).__module__.startswith("atomtune."):
            parts = [getattr(value, name, None) for name in getattr(value, "__dataclass_fields__", ())]
        else:
            return False
        return any(self.holds(part, depth - 1) for part in parts)

    def is_value(self, part: str | int | bytes) -> bool:
        if self.value.isdigit():
            return type(part) is not bytes and str(part) == self.value
        text = part.decode(errors="replace") if type(part) is bytes else part
        return type(text) is str and self.value in text


def main(out: str, arguments: list[str]) -> None:
    import atomtune
    import atomtune.train.run  # imported before the profiler slows down imports
    from atomtune.cli import main as command

    source = Path(atomtune.__file__).resolve().parent
    tracer = Tracer(source, os.environ.get("TRACED_VALUE", ""), int(os.environ.get("TRACED_DEPTH") or 0))
    threading.setprofile(tracer)
    sys.setprofile(tracer)
    try:
        code = command(arguments)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    walk = {"exit": code, "functions": list(tracer.numbers), "entries": tracer.entries}
    Path(out).write_text(json.dumps(walk | {"holders": sorted(tracer.holders)}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
