"""Messages: a list of messages in OpenAI's form (role, content) or ShareGPT's (from, value) → Turns.

Most messages are just a role and a text. They take a short path, as there may be millions.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from shlex import quote
from typing import Any, cast

from atomtune.data.formats.content_parts import Call, Content, read_calls, read_content
from atomtune.data.formats.conversation import read_reasoning
from atomtune.data.formats.fields import (
    Field,
    is_blank,
    is_empty,
    kind,
    missing_key,
    notes_on_unused,
    problems_of,
    read_json,
    read_plain,
    read_text,
)
from atomtune.data.formats.schema import EXCHANGE_KEYS, MEDIA, REASONING, ROLES, TURN_KEYS, WEIGHTS, Schema
from atomtune.data.reading.raw import printable
from atomtune.data.records import Role, Turn

#: The largest weight: the example cache stores a token's weight in a signed byte.
MOST_OFTEN = 127
#: Roles in published data that ask.
_ASKERS = ("用户", "顾客", "客户", "提问者", "customer", "client", "prompter")
_KNOWN = TURN_KEYS | {"id", "tool_call_id"}
_EMPTY_CONTENT = Field(Content())


def read_turns(value: object, key: str, schema: Schema) -> Field[tuple[Turn, ...]]:
    """The turns of a list of messages, or of its JSON text; `key` is its name in messages to the user."""
    parsed = read_json(value, key)
    messages = parsed.value
    if parsed.problems:
        return Field((), parsed.problems)
    if not isinstance(messages, list):
        return Field((), (f"{key} is {kind(messages)}; expected a list of turns",))
    if not messages:
        return Field((), (f"{key} holds no turn",))
    roles = schema.all_roles()
    turns: list[Turn] = []
    problems: list[str] = []
    notes: list[str] = []
    if all(isinstance(message, str) and not message.startswith("{") for message in messages):
        notes.append(f"{key} as a list of texts is read as questions and answers in turn")
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    messages = _apart(messages, roles)
    for number, message in enumerate(messages, 1):
        if schema.keys and isinstance(message, dict):
            message = schema.rename_turn_keys(message)  # noqa: PLW2901  # the same message under our keys
        turn = _plain_turn(message, roles)
        if turn is not None:
            turns.append(turn)
            continue
        full = _read_message(message, key, number, roles)
        problems += full.problems
        notes += full.notes
        if full.value is None:
            continue
        if _is_parallel_call(message, full.value, turns, roles):
            turns[-1] = replace(turns[-1], calls=(*turns[-1].calls, *full.value.calls))
        else:
            turns.append(full.value)
    return Field(tuple(turns), tuple(problems), tuple(notes))


def _apart(messages: list[Any], roles: Mapping[str, str]) -> list[Any]:
    """Split objects that hold several messages.

    swift and MOSS   {"human": …, "assistant": …}
    XTuner           {"system": …, "input": …, "output": …}
    Anthropic        {"role": "user", "content": [{"type": "tool_result", …}, {"type": "text", …}]}
    """
    apart: list[Any] = []
    for message in messages:
        sides = _sides_of(message) if isinstance(message, dict) else None
        if sides is None:
            apart += _results_apart(message, roles)
            continue
        asks, tells = sides
        if not is_empty(message.get("system")):
            apart.append({"role": "system", "content": message["system"]})
        others = {key: value for key, value in message.items() if key not in (asks, tells, "system")}
        apart += [
            {"role": "user", "content": message[asks]},
            {"role": "assistant", "content": message[tells], **others},
        ]
    return apart


def _results_apart(message: Any, roles: Mapping[str, str]) -> list[Any]:
    """Split a user message that contains tool results: one tool message each, then the rest of the content."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list) or roles.get(str(message.get("role"))) == "assistant":
        return [message]
    results = [part for part in content if isinstance(part, dict) and part.get("type") == "tool_result"]
    if not results:
        return [message]
    apart: list[Any] = []
    for part in results:
        text = part.get("content")
        apart.append({"role": "tool", "tool_call_id": part.get("tool_use_id"), "content": "" if text is None else text})
    rest = [part for part in content if part not in results]
    return [*apart, {**message, "content": rest}] if rest else apart


def _sides_of(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """The keys of the question and the answer, if the object holds both; None for a single message."""
    if "role" in message or "from" in message:
        return None
    return next((sides for sides in EXCHANGE_KEYS if sides[0] in message and sides[1] in message), None)


def _plain_turn(message: Any, roles: Mapping[str, str]) -> Turn | None:
    """The turn of a message that is a role and a text and nothing else; None if it needs the full reader."""
    if type(message) is not dict or len(message) != 2:
        return None
    role_name, text = message.get("role"), message.get("content")
    if role_name is None:
        role_name, text = message.get("from"), message.get("value")
    if type(role_name) is not str or type(text) is not str or not text or text.isspace():
        return None
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return None
    role = roles.get(role_name)
    return None if role is None or role == "call" else Turn(cast(Role, role), text)


def _is_parallel_call(message: object, turn: Turn, before: list[Turn], roles: Mapping[str, str]) -> bool:
    """Whether a `tool_call` message belongs to the assistant turn before it.

    Formats with a role for tool calls write one message per call, and one answer may make several calls. A call with
    thoughts of its own is another answer.
    """
    assert isinstance(message, dict)
    is_call = roles.get(message.get("role") or message.get("from") or "") == "call"
    if not is_call or turn.reasoning:
        return False
    return bool(before) and before[-1].role == "assistant" and before[-1].learn == turn.learn


def _read_message(message: object, key: str, number: int, roles: Mapping[str, str]) -> Field[Turn | None]:
    """Read any message, with all the keys it may have; the value is None if its role cannot be read."""
    place = f"{key} {number}"
    if not isinstance(message, dict):
        return Field(None, (f"{place} is {kind(message)}; expected an object with role and content",))
    # Parquet and Arrow add a null for every key that some other message has.
    filled = {name: value for name, value in message.items() if value is not None}
    role = _read_role(filled, message, place, number, roles)
    if role.problems:
        return Field(None, role.problems)
    if role.value in ("assistant", "call"):
        turn = _read_answer(filled, message, place, calls_alone=role.value == "call")
    else:
        turn = _read_other(filled, message, place, cast(Role, role.value))
    media = [key for key in MEDIA if not is_empty(filled.get(key))]
    problems = (
        *(turn.problems or _problems_of_empty(turn.value, place)),
        *[f'{place} has media under "{key}"; only text can be trained on' for key in media],
    )
    return Field(turn.value, problems, (*notes_on_unused(filled, _KNOWN, " of a turn"), *turn.notes))


def _read_role(
    filled: dict[str, Any], message: dict[str, Any], place: str, number: int, roles: Mapping[str, str]
) -> Field[str]:
    key = "from" if "role" not in filled and "from" in filled else "role"
    if key not in filled:
        return Field("", (missing_key(key, message, f"{place} has "),))
    name = filled[key]
    if not isinstance(name, str):
        return Field("", (f"{place}'s {key} is {kind(name)}; expected text",))
    if name in roles:
        return Field(roles[name])
    word = printable(name)[:40]
    # The first turn of a conversation is no answer.
    asks = number == 1 or name.lower() in _ASKERS
    near = [*difflib.get_close_matches(name.lower()[:40], list(ROLES), n=1), "user" if asks else "assistant"]
    problem = (
        f'turn {number} says role "{word}"; expected system, user, assistant or tool. '
        f"Rename it, or pass --roles {quote(f'{word}={near[0]}')}"
    )
    return Field("", (problem,))


def _read_answer(filled: dict[str, Any], message: dict[str, Any], place: str, *, calls_alone: bool) -> Field[Turn]:
    """Read an assistant turn.

    calls_alone  its role is `call`: the content is the JSON of its tool calls
    """
    calls: list[Call] = []
    problems: list[str] = []
    for key in ("tool_calls", "function_call"):
        if filled.get(key):
            listed = read_calls(filled[key], f"{place}'s {key}")
            calls += listed.value
            problems += listed.problems
    body = _content_of(filled)
    content: Field[Content] = _EMPTY_CONTENT
    if calls_alone and body is not None:
        written = read_calls(body, f"{place} (function_call)")
        content = Field(Content(calls=written.value), written.problems)
    elif body is not None:
        content = read_content(body, _place_of_content(filled, place), is_answer=True)
    elif not calls and not problems:
        problems.append(_no_content(message, place))
    weight = _read_weight(filled, place, default=1)
    reasoning = read_reasoning(filled, content.value.reasoning, place)
    turn = Turn(
        "assistant",
        content.value.text,
        learn=weight.value,
        reasoning=reasoning.value,
        calls=(*calls, *content.value.calls),
    )
    return Field(turn, (*problems, *problems_of([content, weight, reasoning])))


def _read_other(filled: dict[str, Any], message: dict[str, Any], place: str, role: Role) -> Field[Turn]:
    """Read a turn that is not learned: system, user or tool."""
    problems: list[str] = []
    body = _content_of(filled)
    content: Field[Content] = _EMPTY_CONTENT
    is_value = role == "tool" and _is_value(body)
    if body is None:
        problems.append(_no_content(message, place))
    elif is_value:
        plain = read_plain(body, _place_of_content(filled, place))
        content = Field(Content("" if plain.problems else json.dumps(body, ensure_ascii=False)), plain.problems)
    else:
        content = read_content(body, _place_of_content(filled, place), is_answer=False)
    weight = _read_weight(filled, place, default=0)
    if weight.value:
        problems.append(
            f"{place} ({role}) has a weight; only an assistant's turn is learned. Leave it out or set it to 0"
        )
    problems += problems_of([content, weight])
    unused = ["tool_calls", "function_call", *REASONING]
    turn = Turn(role, content.value.text)
    if role == "tool":
        # Only a tool turn has a name (the tool's) and the id of the call that it answers.
        name = read_text(filled.get("name", ""), f"{place}'s name")
        problems += name.problems
        call_id = filled.get("tool_call_id", "")
        turn = replace(turn, name=name.value, call_id=call_id if isinstance(call_id, str) else "")
    else:
        unused.append("name")
    notes = tuple(f'key "{key}" of a turn of role {role} is not used' for key in unused if filled.get(key))
    if is_value:
        notes = (*notes, "a tool result that is not a text is written as JSON")
    return Field(turn, tuple(problems), notes)


def _is_value(body: object) -> bool:
    """Whether a tool result is a JSON value: neither a text nor a list of content parts."""
    if isinstance(body, list):
        return not all(isinstance(part, str) or (isinstance(part, dict) and "type" in part) for part in body)
    return isinstance(body, dict | int | float)


def _content_of(filled: dict[str, Any]) -> Any:
    return filled["content"] if "content" in filled else filled.get("value")


def _place_of_content(filled: dict[str, Any], place: str) -> str:
    return f"{place}'s {'content' if 'content' in filled else 'value'}"


def _no_content(message: dict[str, Any], place: str) -> str:
    """The problem with a message that has no content."""
    key = "content"
    if "content" not in message and ("value" in message or "from" in message):
        key = "value"
    if key in message:
        return f"{place}'s {key} is null; expected text"
    return missing_key(key, message, f"{place} has ")


def _read_weight(filled: dict[str, Any], place: str, *, default: int) -> Field[int]:
    """The turn's weight: how many times it is learned."""
    weights: dict[str, int] = {}
    problems: list[str] = []
    for key in WEIGHTS:
        if key not in filled:
            continue
        value = filled[key]
        problem = _problem_of_weight(value, f"{place}'s {key}")
        if problem:
            problems.append(problem)
        else:
            weights[key] = int(value)
    if len(set(weights.values())) > 1:
        named = " and ".join(f"{key} {weight}" for key, weight in weights.items())
        problems.append(f"{place} has {named}; leave one out")
    return Field(next(iter(weights.values()), default), tuple(problems))


def _problem_of_weight(value: object, place: str) -> str:
    """What is wrong with a weight; "" if it is a whole number that the example cache can store."""
    if not isinstance(value, int | float) or not 0 <= value <= MOST_OFTEN:
        is_short_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
        shown = f"{value:g}" if is_short_number else kind(value)
        return f"{place} is {shown}; expected a whole number from 0 to {MOST_OFTEN}"
    if value != int(value):
        return (
            f"{place} is {value:g}; an answer is learned a whole number of times: 0, 1, 2 … Only the ratio of weights "
            "counts: multiply all of them, and the 1 of answers without a weight, until they are whole"
        )
    return ""


def _problems_of_empty(turn: Turn, place: str) -> tuple[str, ...]:
    """Why a turn without text is refused; system texts and tool results may be empty."""
    if not is_blank(turn.text) or turn.calls:
        return ()
    if turn.role == "assistant" and turn.learn:
        return (f"{place} (assistant) is empty: there is nothing to learn",)
    if turn.role == "user":
        return (f"{place} (user) is empty: there is nothing to answer",)
    return ()
