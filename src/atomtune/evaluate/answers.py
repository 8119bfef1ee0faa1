"""Answers: what can be said of a generated text beside its reference."""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

#: What opens the thoughts of a model, in the templates that have them.
_THOUGHTS = re.compile(r"<think>|</think>|<\|channel\|>analysis|\[THINK\]")


@dataclass(frozen=True)
class ToolCalls:
    """The calls a text holds: how many could be read, and how many of them name a tool at hand."""

    parsed: int
    known: int


def chrf(answer: str, reference: str) -> float:
    """sacrebleu's chrF of one answer, 0 to 100: character n-grams, which suit Chinese and English alike."""
    return float(_chrf_metric().sentence_score(answer, [reference]).score)


@cache
def _chrf_metric() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def exactly_equal(answer: str, reference: str) -> bool:
    """Whether the texts are the same, white space at both ends aside."""
    return answer.strip() == reference.strip()


def thinks(answer: str) -> bool:
    """Whether the answer holds a thought."""
    return _THOUGHTS.search(answer) is not None


def calls_in(text: str, tools: Collection[str]) -> ToolCalls:
    """The tool calls in a text: JSON objects with a name and its arguments, in whatever marks a template puts them."""
    calls = [value for value in _json_objects(text) if _is_call(value)]
    return ToolCalls(parsed=len(calls), known=sum(call["name"] in tools for call in calls))


def _is_call(value: dict[str, Any]) -> bool:
    arguments = value.get("arguments", value.get("parameters"))
    return isinstance(value.get("name"), str) and isinstance(arguments, dict | str)


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object in a text that stands in no other one."""
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end, value = at + 1, None
        if isinstance(value, dict):
            yield value
        at = text.find("{", end)
