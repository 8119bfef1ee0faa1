"""Turns: a list of messages, as OpenAI's (role, content) or ShareGPT's (from, value), → Turns.

Before: chats.py.  After: a Record's turns.
Most messages are a role and a text; they are read on a short path, since a million records go along it.
"""

import difflib
from collections.abc import Mapping
from typing import Any, cast

from atomtune.data.formats.content_parts import calls_of, content_of
from atomtune.data.formats.fields import Reading, is_blank, kind, printable
from atomtune.data.formats.schema import REASONING, ROLES, TURN_KEYS, WEIGHTS
from atomtune.data.records import Role, Turn

#: The store counts how often a token is learned in one signed byte.
MOST_OFTEN = 127
#: Keys that say nothing about what is learned; ids tie a tool's turn to a call, which its place does already.
_KNOWN = TURN_KEYS | {"id", "tool_call_id"}


def turns_of_list(value: object, key: str, reading: Reading) -> list[Turn]:
    """The turns of a list of messages (or its JSON text) that stands under this key; problems go to reading."""
    messages = reading.json(value, key) if isinstance(value, str) else value
    turns: list[Turn] = []
    if not isinstance(messages, list):
        if not isinstance(value, str) or messages is not None:
            reading.problems.append(f"{key} is {kind(messages)}; expected a list of turns")
        return turns
    if not messages:
        reading.problems.append(f"{key} holds no turn")
    roles = {**ROLES, **reading.schema.roles} if reading.schema.roles else ROLES
    if reading.schema.keys:
        messages = [reading.schema.rename_turn_keys(one) if isinstance(one, dict) else one for one in messages]
    for number, message in enumerate(messages, 1):
        turn = _simple(message, roles) or _Message(message, key, number, reading).turn(roles)
        if turn is not None and (turn.role != "system" or not is_blank(turn.text)):
            turns.append(turn)
    return turns


def _simple(message: Any, roles: Mapping[str, str]) -> Turn | None:
    """The turn of a message that is a role and a text and nothing else; None sends it the long way."""
    if type(message) is not dict or len(message) != 2:
        return None
    said, text = message.get("role"), message.get("content")
    if said is None:
        said, text = message.get("from"), message.get("value")
    if type(said) is not str or type(text) is not str or not text or text.isspace():
        return None
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return None
    role = roles.get(said)
    return None if role is None or role == "call" else Turn(cast(Role, role), text)


class _Message:
    """One message with anything a message may have."""

    def __init__(self, message: object, key: str, number: int, reading: Reading) -> None:
        self.given = message
        self.where = f"{key} {number}"
        self.number = number
        self.reading = reading
        self.problems = reading.problems

    def turn(self, roles: Mapping[str, str]) -> Turn | None:
        if not isinstance(self.given, dict):
            self.problems.append(f"{self.where} is {kind(self.given)}; expected an object with role and content")
            return None
        # A table of columns writes null for every key that another message has.
        message = {key: one for key, one in self.given.items() if one is not None}
        role = self._role(message, roles)
        if role is None:
            return None
        before = len(self.problems)
        self.reading.note_unused(message, _KNOWN, " of a turn")
        turn = self._assistant(message, calls_alone=role == "call") if role in ("assistant", "call") else None
        if turn is None:
            turn = self._other(message, cast(Role, role))
        if len(self.problems) == before:
            self._refuse_empty(turn)
        return turn

    def _role(self, message: dict[str, Any], roles: Mapping[str, str]) -> str | None:
        key = "from" if "role" not in message and "from" in message else "role"
        if key not in message:
            self.reading.missing(key, self.given_keys(), f"{self.where} has ")
            return None
        said = message[key]
        role = roles.get(said) if isinstance(said, str) else None
        if role is None and isinstance(said, str):
            near = difflib.get_close_matches(said.lower()[:40], list(ROLES), n=1)
            word = printable(said)[:40]
            self.problems.append(
                f'turn {self.number} says role "{word}"; expected system, user, assistant or tool. '
                f"Rename it, or pass --roles {word}={ROLES[near[0]] if near else 'assistant'}"
            )
        elif role is None:
            self.problems.append(f"{self.where}'s {key} is {kind(said)}; expected text")
        return role

    def given_keys(self) -> Mapping[str, Any]:
        return cast(Mapping[str, Any], self.given)

    def _assistant(self, message: dict[str, Any], *, calls_alone: bool) -> Turn:
        calls = []
        for key in ("tool_calls", "function_call"):
            if message.get(key):
                calls += calls_of(message[key], f"{self.where}'s {key}", self.reading)
        text = reasoning = ""
        content = self._content(message)
        if calls_alone and content is not None:
            calls += calls_of(content, f"{self.where} (function_call)", self.reading)
        elif content is not None:
            text, reasoning, more = content_of(content, self._place(message), self.reading, answer=True)
            calls += more
        elif not calls:
            self._refuse_no_content()
        learn = self._weight(message, unsaid=1)
        return Turn("assistant", text, "", learn, self._reasoning(message, reasoning), tuple(calls))

    def _other(self, message: dict[str, Any], role: Role) -> Turn:
        content, text = self._content(message), ""
        if content is None:
            self._refuse_no_content()
        else:
            text, *_ = content_of(content, self._place(message), self.reading, answer=False)
        if self._weight(message, unsaid=0):
            self.problems.append(
                f"{self.where} ({role}) has a weight; only an assistant's turn is learned. Leave it out or make it 0"
            )
        for key in ("tool_calls", "function_call", *REASONING, *(() if role == "tool" else ("name",))):
            if message.get(key):
                self.reading.notes.add(f'key "{key}" of a turn of role {role} is not used')
        name = self.reading.text(message.get("name", ""), f"{self.where}'s name") if role == "tool" else ""
        return Turn(role, text, name=name)

    def _content(self, message: dict[str, Any]) -> Any:
        return message["content"] if "content" in message else message.get("value")

    def _place(self, message: dict[str, Any]) -> str:
        return f"{self.where}'s {'content' if 'content' in message else 'value'}"

    def _refuse_no_content(self) -> None:
        given = self.given_keys()
        key = "value" if "content" not in given and ("value" in given or "from" in given) else "content"
        if key in given:
            self.problems.append(f"{self.where}'s {key} is null; expected text")
        else:
            self.reading.missing(key, given, f"{self.where} has ")

    def _reasoning(self, message: dict[str, Any], from_parts: str) -> str:
        said = [self.reading.text(message[key], f"{self.where}'s {key}") for key in REASONING if key in message]
        thoughts = sorted({text for text in [*said, from_parts] if text.strip()})
        if len(thoughts) > 1:
            self.problems.append(f"{self.where} gives its reasoning twice, and differently; leave one out")
        return thoughts[0] if thoughts else ""

    def _weight(self, message: dict[str, Any], *, unsaid: int) -> int:
        """How often the turn is learned."""
        weights = {}
        for key in WEIGHTS:
            if key not in message:
                continue
            given = message[key]
            if not isinstance(given, int | float) or not 0 <= given <= MOST_OFTEN:
                said = f"{given:g}" if type(given) in (int, float) and abs(given) < 1e15 else kind(given)
                self.problems.append(f"{self.where}'s {key} is {said}; expected a whole number from 0 to {MOST_OFTEN}")
            elif given != int(given):
                self.problems.append(
                    f"{self.where}'s {key} is {given:g}; an answer is learned a whole number of times: 0, 1, 2 …"
                )
            else:
                weights[key] = int(given)
        if len(set(weights.values())) > 1:
            said = " and ".join(f"{key} {weight}" for key, weight in weights.items())
            self.problems.append(f"{self.where} says {said}; leave one out")
        return next(iter(weights.values()), unsaid)

    def _refuse_empty(self, turn: Turn) -> None:
        if not is_blank(turn.text) or turn.calls:
            return
        if turn.role == "assistant" and turn.learn:
            self.problems.append(f"{self.where} (assistant) is empty: there is nothing to learn")
        elif turn.role == "user":
            self.problems.append(f"{self.where} (user) is empty: there is nothing to answer")
