"""Content parts: a message's content as a list of parts: text, reasoning, tool calls.

Read are the forms of OpenAI ({"type": "text", "text": …}), Anthropic ({"type": "tool_use", …}) and LLaMA-Factory
({"type": "text", "value": …}). Images, audio and video are refused.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from atomtune.data.formats.fields import Field, kind, problems_of, read_json, read_plain, read_text
from atomtune.data.reading.raw import printable

#: {"name": …, "arguments": {…}}, and optionally the "id" to which the tool's turn refers.
Call = Mapping[str, Any]
#: Type of a part → the keys that may hold its text.
_TEXTS = {
    **dict.fromkeys(("text", "input_text", "output_text"), ("text", "value")),
    "refusal": ("refusal", "value"),
}
_THOUGHTS = {"reasoning": ("reasoning", "text", "value"), "thinking": ("thinking", "text", "value")}
_CALLS = ("tool_call", "tool_use", "function_call", "function")
#: Keys of a call's arguments: OpenAI's, Llama 3.1's, Anthropic's, Gemini's.
_ARGUMENTS = ("arguments", "parameters", "input", "args")


class Content(NamedTuple):
    """The parts of a message's content, each kind joined."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


def read_content(value: object, place: str, *, is_answer: bool) -> Field[Content]:
    """The content of a message; only an answer may contain reasoning and tool calls."""
    if not isinstance(value, list):
        whole = read_text(value, place)
        return Field(Content(whole.value), whole.problems)
    text, reasoning = "", ""
    calls: list[Call] = []
    problems: list[str] = []
    for part in value:
        content, part_problems, _ = _read_part(part, place, is_answer=is_answer)
        text += content.text
        reasoning += content.reasoning
        calls += content.calls
        problems += part_problems
    return Field(Content(text, reasoning, tuple(calls)), tuple(problems))


def _read_part(part: object, place: str, *, is_answer: bool) -> Field[Content]:
    if isinstance(part, str):
        text = read_text(part, place)
        return Field(Content(text.value), text.problems)
    if not isinstance(part, dict):
        return Field(Content(), (f"{place} holds a part that is {kind(part)}; expected an object with a type",))
    type_name = part.get("type")
    if isinstance(type_name, str) and type_name:
        return _read_typed_part(part, type_name, place, is_answer=is_answer)
    return Field(Content(), (f"{place} holds a part whose type is {kind(type_name)}; expected text",))


def _read_typed_part(part: dict[str, Any], type_name: str, place: str, *, is_answer: bool) -> Field[Content]:
    part_place = f"{place}'s part of type {printable(type_name)}"
    if type_name in _TEXTS:
        text = read_text(_first_of(part, _TEXTS[type_name]), part_place)
        return Field(Content(text.value), text.problems)
    if is_answer and type_name in _THOUGHTS:
        thought = read_text(_first_of(part, _THOUGHTS[type_name]), part_place)
        return Field(Content(reasoning=thought.value), thought.problems)
    if is_answer and type_name in _CALLS:
        calls = read_calls(_call_in(part, type_name), part_place)
        return Field(Content(calls=calls.value), calls.problems)
    short_name = printable(type_name)[:40]
    return Field(Content(), (f'{place} holds a part of type "{short_name}"; only text can be trained on',))


def _first_of(part: Mapping[str, Any], keys: tuple[str, ...]) -> object:
    """The first of these keys that has a value."""
    for key in keys:
        if part.get(key) is not None:
            return part[key]
    return None


def _call_in(part: dict[str, Any], type_name: str) -> object:
    """A tool-call part, converted to the form of an entry of `tool_calls`.

    OpenAI     {"type": "function", "function": {"name": …, "arguments": …}}
    Anthropic  {"type": "tool_use", "name": …, "input": {…}}
    """
    if isinstance(part.get("value"), str | list | dict):  # LLaMA-Factory: the call or its JSON text
        return part["value"]
    function = part
    for key in ("function", type_name):
        if isinstance(part.get(key), dict):
            function = part[key]
            break
    return {"id": part.get("id"), "function": function}


def read_calls(value: object, place: str) -> Field[tuple[Call, ...]]:
    """Tool calls, from a list of them, a single call, or the JSON text of either."""
    parsed = read_json(value, place)
    if parsed.problems:
        return Field((), parsed.problems)
    listed = parsed.value if isinstance(parsed.value, list) else [parsed.value]
    if not listed:
        return Field((), (f"{place} holds no call",))
    calls = [_read_call(call, place) for call in listed]
    return Field(tuple(call.value for call in calls), problems_of(calls))


def _read_call(call: object, place: str) -> Field[Call]:
    if not isinstance(call, dict):
        return Field({}, (f"{place} is {kind(call)}; expected a call with name and arguments",))
    function = call.get("function", call)
    if not isinstance(function, dict):
        return Field({}, (f"{place} is {kind(function)}; expected a call with name and arguments",))
    name = function.get("name")
    if not isinstance(name, str) or not name:
        return Field({}, (f"{place} has no name",))
    arguments = _first_of(function, _ARGUMENTS)
    if arguments is None or arguments == "":
        arguments = {}
    parsed = read_json(arguments, f"{place}'s arguments")
    if parsed.problems:
        return Field({}, parsed.problems)
    if not isinstance(parsed.value, dict):
        problem = f"{place}'s arguments are {kind(parsed.value)}; expected an object or its JSON text"
        return Field({}, (problem,))
    named = {"name": name, "arguments": parsed.value}
    call_id = call.get("id")
    if isinstance(call_id, str) and call_id:
        named = {"id": call_id, **named}
    return read_plain(named, place)
