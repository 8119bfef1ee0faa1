"""Parts: what a message's content may be besides a text: text parts, thoughts, calls of tools; images are refused.

Before: turns.py.  After: a Turn's text, reasoning and calls.
"""

from collections.abc import Mapping
from typing import Any

from atomtune.data.formats.fields import Reading, kind, printable

Call = Mapping[str, Any]
#: type of a part → the keys its text may stand under
_TEXTS = {"text": ("text",), "input_text": ("text",), "output_text": ("text",), "refusal": ("refusal",)}
_THOUGHTS = {"reasoning": ("reasoning", "text"), "thinking": ("thinking", "text")}
_CALLS = ("tool_call", "tool_use", "function_call", "function")


def content_of(content: object, where: str, reading: Reading, *, answer: bool) -> tuple[str, str, list[Call]]:
    """Text, reasoning and calls of a content; only an answer may hold the last two."""
    if not isinstance(content, list):
        return reading.text(content, where), "", []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Call] = []
    for part in content:
        if isinstance(part, str):
            texts.append(reading.text(part, where))
            continue
        if not isinstance(part, dict):
            reading.problems.append(f"{where} holds a part that is {kind(part)}; expected an object with a type")
            continue
        said = part.get("type")
        name = said if isinstance(said, str) else ""
        if name in _TEXTS:
            texts.append(_text(part, _TEXTS[name], where, reading))
        elif answer and name in _THOUGHTS:
            thoughts.append(_text(part, _THOUGHTS[name], where, reading))
        elif answer and name in _CALLS:
            calls += calls_of(_called(part, name), f"{where}'s part of type {name}", reading)
        else:
            reading.problems.append(_not_read(name, said, where))
    return "".join(texts), "".join(thoughts), calls


def _text(part: dict[str, Any], keys: tuple[str, ...], where: str, reading: Reading) -> str:
    given = next((part[key] for key in keys if part.get(key) is not None), None)
    return reading.text(given, f"{where}'s part of type {part['type']}")


def _called(part: dict[str, Any], name: str) -> Any:
    """A part that is a call, in the shape of `tool_calls`."""
    inner = next((part[key] for key in ("function", name) if isinstance(part.get(key), dict)), part)
    return {"name": inner.get("name"), "arguments": inner.get("arguments", inner.get("input"))}


def _not_read(name: str, said: object, where: str) -> str:
    if not name:
        return f"{where} holds a part whose type is {kind(said)}; expected text"
    return f'{where} holds a part of type "{printable(name)[:40]}"; only text can be trained on'


def calls_of(value: object, where: str, reading: Reading) -> list[Call]:
    """Calls of tools as {"name": …, "arguments": {…}}, from a list, one of them, or the JSON text of either."""
    before = len(reading.problems)
    given = reading.json(value, where)
    if len(reading.problems) > before:
        return []
    calls = []
    for one in given if isinstance(given, list) else [given]:
        call = _call(one, where, reading)
        if call is not None and reading.plain(call, where):
            calls.append(call)
    if given == []:
        reading.problems.append(f"{where} holds no call")
    return calls


def _call(one: object, where: str, reading: Reading) -> Call | None:
    inner = one.get("function", one) if isinstance(one, dict) else one
    if not isinstance(inner, dict):
        reading.problems.append(f"{where} is {kind(inner)}; expected a call with name and arguments")
        return None
    name, given = inner.get("name"), inner.get("arguments")
    if not isinstance(name, str) or not name:
        reading.problems.append(f"{where} has no name")
        return None
    if given is None or given == "":
        return {"name": name, "arguments": {}}
    before = len(reading.problems)
    arguments = reading.json(given, f"{where}'s arguments")
    if len(reading.problems) > before:
        return None
    if not isinstance(arguments, dict):
        reading.problems.append(f"{where}'s arguments are {kind(arguments)}; expected an object or its JSON text")
        return None
    return {"name": name, "arguments": arguments}
