"""Conversation: what all formats have in common: turns, tools and variables become a Record or a Refusal."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from atomtune.data.encoding.thoughts import problem_of_thoughts
from atomtune.data.formats.fields import Field, Tool, is_blank, kind, read_json, read_plain, read_text
from atomtune.data.formats.schema import KWARGS, REASONING, THINKING, VARIABLES
from atomtune.data.records import ParsedRecord, Record, Refusal, RefusalKind, Turn

_ANSWERS = ("assistant", "text")


class Conversation(NamedTuple):
    """What a format's reader returns for a record."""

    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...] = ()
    variables: Mapping[str, Any] = {}  # of the chat template


def with_system(record: Mapping[str, Any], turns: Sequence[Turn]) -> Field[tuple[Turn, ...]]:
    """The turns with the record's `system` text in front; a first turn of role system may repeat it."""
    value = record.get("system")
    if value is None:
        return Field(tuple(turns))
    system = read_text(value, "system")
    if not system.value.strip():
        return Field(tuple(turns), system.problems)
    if not turns or turns[0].role != "system":
        return Field((Turn("system", system.value), *turns), system.problems)
    if turns[0].text != system.value:
        differ = "system and the first turn, which also has the role system, differ; leave one of them out"
        return Field(tuple(turns), (*system.problems, differ))
    return Field(tuple(turns), system.problems)


def read_reasoning(filled: Mapping[str, Any], from_parts: str, place: str) -> Field[str]:
    """The assistant's reasoning. Servers return it under several keys at once, whose texts must be equal.

    filled      a message, or a record with a single answer, without its nulls
    from_parts  reasoning from the content parts, or ""
    """
    thoughts = {from_parts}
    problems: list[str] = []
    for key in REASONING:
        if key in filled:
            text = read_text(filled[key], f"{place}'s {key}")
            thoughts.add(text.value)
            problems += text.problems
    different = sorted(text for text in thoughts if text.strip())
    if len(different) > 1:
        problems.append(f"{place} gives its reasoning twice, and differently; leave one out")
    return Field(different[0] if different else "", tuple(problems))


def with_reasoning(answer: Turn, record: Mapping[str, Any]) -> Field[Turn]:
    """The only answer of a record, with the reasoning from the record's own keys."""
    if frozenset(REASONING).isdisjoint(record):
        return Field(answer)
    filled = {key: value for key, value in record.items() if value is not None}
    reasoning = read_reasoning(filled, "", "the record")
    return Field(replace(answer, reasoning=reasoning.value), reasoning.problems)


def read_variables(record: Mapping[str, Any]) -> Field[dict[str, Any]]:
    """The variables that a record sets for its chat template."""
    variables: dict[str, Any] = {}
    problems: list[str] = []
    if not _is_empty_cell(record.get(KWARGS)):
        several = _read_value(record[KWARGS], KWARGS)
        problems += several.problems
        if isinstance(several.value, dict):
            variables |= several.value
        elif not several.problems:
            problems.append(f"{KWARGS} is {kind(several.value)}; expected an object")
    for key in VARIABLES:
        if not _is_empty_cell(record.get(key)):
            single = _read_value(record[key], key)
            problems += [
                f"{problem}; the key is a variable of the template: rename it if it means another thing"
                for problem in single.problems
            ]
            if variables.get(key, single.value) != single.value:
                problems.append(f"{key} has another value in {KWARGS}; keep one of them")
            variables[key] = single.value
    thinks = variables.get(THINKING)
    if not problems and not isinstance(thinks, bool | None):  # a template may take "false", and even 0, for true
        problems.append(f"{THINKING} is {kind(thinks)}; expected true or false")
    return Field(variables, tuple(problems))


def _read_value(value: object, key: str) -> Field[Any]:
    """A value for a template, which may be JSON text, as in the cell of a table."""
    parsed = read_json(value, key)
    plain = read_plain(parsed.value, key)
    return Field(plain.value, (*parsed.problems, *plain.problems))


def _is_empty_cell(value: object) -> bool:
    """Whether a cell of a table holds nothing; CSV has no null."""
    return value is None or (isinstance(value, str) and is_blank(value))


def as_parsed(conversation: Field[Conversation], origin: str) -> ParsedRecord:
    """The record up to its last answer, or a Refusal if there is a problem or nothing to learn."""
    (turns, tools, variables), problems, notes = conversation
    if turns and turns[0].role == "assistant" and turns[0].learn:
        # Exports split long chats, so this one starts in the middle. No server is asked for an answer without a prompt.
        turns = (replace(turns[0], learn=0), *turns[1:])
        notes = (*notes, "an answer with nothing before it is read but not learned")
    end, learns = 0, False  # one past the last answer, and whether any is learned
    for number, turn in enumerate(turns, 1):
        if turn.role in _ANSWERS:
            end = number
            learns = learns or turn.learn > 0
        if turn.role == "assistant" and turn.learn and (problem := problem_of_thoughts(turn)):
            problems = (*problems, f"turn {number} (assistant) {problem}")
    if not problems and not learns:
        reason = "weight 0 on every answer" if end else "no assistant turn"
        if end == 1 and turns[0].role == "assistant":
            reason = "there is nothing before the only answer"
        problems = (f"{reason}: there is nothing to learn",)
    if problems:
        return ParsedRecord(Refusal(origin, "; ".join(problems), RefusalKind.NO_RECORD))
    if end < len(turns):
        notes = (*notes, "turns after the last answer are left out")
        turns = turns[:end]
    if tools:
        listed = {tool["function"]["name"] for tool in tools}
        if not all(call["name"] in listed for turn in turns for call in turn.calls):
            notes = (*notes, "an answer calls a tool that the record does not list")
    if notes:
        notes = tuple(dict.fromkeys(notes))  # a note counts records, so each record has it at most once
    return ParsedRecord(Record(turns, origin, tools, variables), notes)
