"""Tool calls: those in a text, in the format of any template we know."""

import ast
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from atomtune.data.records import Turn

#: Whole calls between two tags; each ends before the next begins.
_BETWEEN_MARKS = (
    re.compile(r"<function=(?P<name>[^>\s]+)>(?:(?!<function=).)*?</function>", re.DOTALL),  # Qwen3.5, Nemotron 3
    re.compile(r"<tool_call>\s*(?P<name>[\w.-]+)\s*(?:<arg_key>(?:(?!<tool_call>).)*?)?</tool_call>", re.DOTALL),  # GLM
    re.compile(r"<\|tool_call>call:(?P<name>[\w.-]+)\{(?:(?!<\|tool_call>).)*?\}<tool_call\|>", re.DOTALL),  # Gemma 4
    re.compile(r'<[\w:]*invoke\sname="(?P<name>[^"]+)">(?:(?!invoke\sname=).)*?</[\w:]*invoke>', re.DOTALL),  # MiniMax
)
#: The name of a tool, up to where its arguments begin, which are JSON.
_BEFORE_ARGUMENTS = (
    re.compile(r"<｜tool▁sep｜>(?P<name>[\w.-]+)\s*```json\s*(?=\{)"),  # DeepSeek V3 and R1
    re.compile(r"<｜tool▁call▁begin｜>(?P<name>[\w.-]+)<｜tool▁sep｜>(?=\{)"),  # DeepSeek V3.1
    re.compile(r"\[TOOL_CALLS\](?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\](?=\{)"),  # Mistral
    re.compile(r"functions\.(?P<name>[\w.-]+):\d+<\|tool_call_argument_begin\|>\s*(?=\{)"),  # Kimi K2
)
#: A list of calls as Python writes them: LFM2.
_AS_PYTHON = re.compile(r"<\|tool_call_start\|>(\[.*?\])<\|tool_call_end\|>", re.DOTALL)


@dataclass(frozen=True)
class ToolCalls:
    """The calls in a text: how many can be read, and how many of them name an available tool."""

    parsed: int
    known: int


def calls_of(text: str, turn: Turn, tools: Collection[str]) -> ToolCalls:
    """The calls of an answer: those in its text, else those of its turn (gpt-oss names a tool in a header)."""
    found = calls_in(text, tools)
    if found.parsed:
        return found
    return _counted([call["name"] for call in turn.calls if isinstance(call.get("arguments"), dict)], tools)


def calls_in(text: str, tools: Collection[str]) -> ToolCalls:
    """The calls in a text: JSON objects with a name and arguments between any tags, else calls in a format we know."""
    names = [call["name"] for call in _json_objects(text) if _is_call(call)]
    return _counted(names or list(_named(text)), tools)


def _counted(names: Collection[str], tools: Collection[str]) -> ToolCalls:
    return ToolCalls(parsed=len(names), known=sum(name in tools for name in names))


def _is_call(value: dict[str, Any]) -> bool:
    arguments = value.get("arguments", value.get("parameters"))
    return isinstance(value.get("name"), str) and isinstance(arguments, dict | str)


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object in a text that is not inside another one."""
    at = text.find("{")
    while at >= 0:
        value, end = _json_at(text, at)
        if value is not None:
            yield value
        at = text.find("{", end)


def _json_at(text: str, at: int) -> tuple[dict[str, Any] | None, int]:
    """The JSON object that begins at this place, and where it ends; None if there is no object."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, at + 1
    return (value if isinstance(value, dict) else None), end


def _named(text: str) -> Iterator[str]:
    """The tools named by calls that are not JSON objects."""
    for pattern in _BETWEEN_MARKS:
        yield from (call["name"] for call in pattern.finditer(text))
    for pattern in _BEFORE_ARGUMENTS:
        yield from (call["name"] for call in pattern.finditer(text) if _json_at(text, call.end())[0] is not None)
    for listed in _AS_PYTHON.finditer(text):
        yield from _named_in_python(listed[1])


def _named_in_python(listed: str) -> Iterator[str]:
    try:
        value = ast.parse(listed, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for call in value.elts if isinstance(value, ast.List) else ():
        if isinstance(call, ast.Call):
            yield ast.unparse(call.func)
