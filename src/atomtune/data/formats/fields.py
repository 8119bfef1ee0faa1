"""Reading: texts, tools and turns taken out of one JSON value, with everything that is wrong with it.

Before: formats.py knows the format.  After: a Record, or a Refusal that names all problems at once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atomtune.data.formats.schema import Schema
from atomtune.data.reading.raw import DECODER
from atomtune.data.records import Record, Refusal, RefusalKind, Turn

_ANSWERS = ("assistant", "text")
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_KINDS: dict[type, str] = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}


@dataclass(slots=True)
class Reading:
    """One record while it is read: its problems, and what is accepted but worth saying."""

    origin: str
    schema: Schema
    problems: list[str] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)

    def text(self, value: object, where: str) -> str:
        """The value, which must be a text that can be written as UTF-8."""
        if not isinstance(value, str):
            self.problems.append(f"{where} is {kind(value)}; expected text")
            return ""
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                self.problems.append(f"{where} holds half a surrogate pair at character {error.start + 1}")
        return value

    def json(self, value: object, where: str) -> Any:
        """The value that a text holds as JSON, as a cell of a table does; any other value as it is."""
        if not isinstance(value, str):
            return value
        try:
            return DECODER.decode(value)
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            self.problems.append(f"{where} is not JSON: {printable(why)}")
            return None

    def plain(self, value: Any, where: str) -> bool:
        """Whether the value can be written as JSON in UTF-8, as a template will."""
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except UnicodeEncodeError:
            self.problems.append(f"{where} holds half a surrogate pair")
        except (TypeError, ValueError, RecursionError):
            self.problems.append(f"{where} holds a value that is no JSON")
        else:
            return True
        return False

    def tools(self, value: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        """The record's `tools` (or older `functions`) in the shape OpenAI gives them, from a list or its JSON text."""
        key = "tools" if value.get("tools") else "functions"
        given = value.get(key)
        if not given or (isinstance(given, str) and not given.strip()):
            return ()
        listed = self.json(given, key)
        if isinstance(listed, dict):
            listed = [listed]
        if not isinstance(listed, list):
            if listed is not None or not isinstance(given, str):
                self.problems.append(f"{key} is {kind(listed)}; expected a list of tools")
            return ()
        return tuple(tool for number, one in enumerate(listed, 1) if (tool := self._tool(one, f"{key} {number}")))

    def _tool(self, tool: object, where: str) -> Mapping[str, Any] | None:
        if not isinstance(tool, dict):
            self.problems.append(f"{where} is {kind(tool)}; expected an object with a name")
            return None
        function = tool.get("function") or tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            self.problems.append(f"{where} has no name")
            return None
        if not self.plain(tool, where):
            return None
        return tool if function is not tool else {"type": "function", "function": tool}

    def missing(self, key: str, value: Mapping[str, Any], where: str = "") -> None:
        self.problems.append(f'{where}no key "{key}"; keys here: {keys_of(value)}')

    def note_unused(self, value: Mapping[str, Any], used: frozenset[str], of: str = "") -> None:
        """Say once per record and key that a key with a value is passed over."""
        if not value.keys() <= used:
            for key in value.keys() - used:
                if value[key] not in _EMPTY:
                    self.notes.add(f'key "{printable(key)}"{of} is not used by this format')

    def refused(self) -> Refusal:
        return Refusal(self.origin, "; ".join(self.problems), RefusalKind.NO_RECORD)

    def end(self, turns: list[Turn], tools: tuple[Mapping[str, Any], ...] = ()) -> Record | Refusal:
        """The record of these turns, up to its last answer; refused where there is a problem or nothing to learn."""
        last, learned = -1, False
        for i, turn in enumerate(turns):
            if turn.role in _ANSWERS:
                last, learned = i, learned or turn.learn > 0
        if not learned and not self.problems:
            why = "weight 0 on every answer" if last >= 0 else "no turn of an assistant"
            self.problems.append(f"{why}: there is nothing to learn")
        if self.problems:
            return self.refused()
        if last < len(turns) - 1:
            self.notes.add("turns behind the last answer are left out")
            turns = turns[: last + 1]
        return Record(tuple(turns), self.origin, tools)

    def after_system(self, value: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
        """The turns behind the record's own `system` text, which a first turn of role system may repeat."""
        given = value.get("system")
        text = self.text(given, "system") if given is not None else ""
        if not text.strip():
            return turns
        if not turns or turns[0].role != "system":
            return [Turn("system", text), *turns]
        if turns[0].text != text:
            self.problems.append("system and the first turn, which is of role system, differ; leave one of them out")
        return turns


def is_blank(text: str) -> bool:
    return not text or text.isspace()


def keys_of(value: Mapping[str, Any]) -> str:
    return ", ".join(map(printable, value)) or "none"


def printable(text: object) -> str:
    """A key as it can be written down, halves of surrogate pairs included."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def kind(value: object) -> str:
    """What a user calls a value of this type."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")
