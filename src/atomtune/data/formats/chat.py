"""Chats: readers for conversations: ShareGPT, OpenAI's messages, prompt and completion, rendered texts.

All answers are learned, as many times as their weight says (default: once).
"""

import re
from collections.abc import Sequence
from typing import Any

from atomtune.data.formats.conversation import Conversation, read_variables, with_reasoning, with_system
from atomtune.data.formats.fields import Field, is_blank, notes_on_unused, problems_of, read_text, read_tools
from atomtune.data.formats.messages import read_turns
from atomtune.data.formats.rendered_text import begins_like, turns_of
from atomtune.data.formats.schema import KWARGS, REASONING, SIGNS, VARIABLES, Schema
from atomtune.data.records import Role, Turn

_BESIDE = frozenset({"system", "tools", "functions", KWARGS, *VARIABLES})
_NOTHING = Field(Conversation(()))
_ONE_MESSAGE = (
    "one message of a tree (OpenAssistant), whose question is another record; put the messages from the root to each "
    'last answer into one record: {"messages": [{"role": …, "content": …}, …]}'
)
#: The beginning of a list of messages as JSON, or as Python prints it, as in the cell of a table.
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(["'])(?:role|content|from|value)\1\s*:""")
_MESSAGES_AS_TEXT = '"completion" is a list of messages written as text, and is learned as that text'
_LEARNED_TOO = 'the answers inside "prompt" are learned too (--learn last leaves them out)'


def read_sharegpt(record: dict[str, Any], schema: Schema) -> Field[Conversation]:
    """{"conversations": [{"from": "human", "value": …}, …]}"""
    return _read_list(record, "conversations", schema)


def read_messages(record: dict[str, Any], schema: Schema) -> Field[Conversation]:
    """{"messages": [{"role": "user", "content": …}, …]}"""
    return _read_list(record, "messages", schema)


def _read_list(record: dict[str, Any], key: str, schema: Schema) -> Field[Conversation]:
    if key not in record:
        return _NOTHING
    return _with_the_rest(record, read_turns(record[key], key, schema), frozenset({key}))


def _with_the_rest(record: dict[str, Any], turns: Field[tuple[Turn, ...]], used: frozenset[str]) -> Field[Conversation]:
    """The conversation: the turns, and the system text, tools and variables under the record's other keys.

    used  the keys that were already read
    """
    if record.keys() <= used:
        return Field(Conversation(turns.value), turns.problems, turns.notes)
    all_turns = with_system(record, turns.value)
    tools = read_tools(record)
    variables = read_variables(record)
    problems = problems_of([turns, all_turns, tools, variables])
    notes = (*turns.notes, *notes_on_unused(record, used | _BESIDE))
    return Field(Conversation(all_turns.value, tools.value, variables.value), problems, notes)


def read_prompt(record: dict[str, Any], schema: Schema) -> Field[Conversation]:
    """{"prompt": …, "completion": …}; each is a text or a list of messages."""
    if "prompt" not in record or "completion" not in record:
        return _NOTHING
    prompt = _read_side(record["prompt"], "user", "prompt", schema)
    completion = _read_side(record["completion"], "assistant", "completion", schema)
    problems = problems_of([prompt, completion])
    notes = (*prompt.notes, *completion.notes)
    if not problems and not _has_answer(completion.value):
        problems = ("completion has no assistant turn: there is nothing to learn",)
    if isinstance(record["completion"], str) and _MESSAGES.match(record["completion"]):
        notes = (*notes, _MESSAGES_AS_TEXT)
    if _has_answer(prompt.value):
        notes = (*notes, _LEARNED_TOO)
    answer, used = completion.value, frozenset(SIGNS["prompt"])
    if len(answer) == 1 and isinstance(record["completion"], str):
        last_answer = with_reasoning(answer[0], record)
        answer, problems, used = (last_answer.value,), (*problems, *last_answer.problems), used | {*REASONING}
    return _with_the_rest(record, Field((*prompt.value, *answer), problems, notes), used)


def _read_side(value: object, role: Role, key: str, schema: Schema) -> Field[tuple[Turn, ...]]:
    if isinstance(value, list):
        if role == "assistant" and value and all(isinstance(item, str) for item in value):
            return Field((), (f"{key} is a list of texts; expected one text or a list of messages",))
        return read_turns(value, key, schema)
    text = read_text(value, key)
    if not text.problems and is_blank(text.value):
        purpose = "answer" if role == "user" else "learn"
        return Field((), (f"{key} is empty: there is nothing to {purpose}",))
    return Field((Turn(role, text.value),), text.problems)


def _has_answer(turns: Sequence[Turn]) -> bool:
    return any(turn.role == "assistant" for turn in turns)


def read_rendered(record: dict[str, Any], schema: Schema) -> Field[Conversation]:
    """{"text": …}: a text that a known template has rendered is split into turns; any other text is learned whole."""
    if "text" not in record:
        return _NOTHING
    text = read_text(record["text"], "text")
    if text.problems:
        return Field(Conversation(()), text.problems)
    if is_blank(text.value):
        return Field(Conversation(()), ("text is empty: there is nothing to learn",))
    if "role" in record and ("parent_id" in record or "message_id" in record):
        return Field(Conversation(()), (_ONE_MESSAGE,))
    rendered = turns_of(text.value)
    if rendered is None:
        family = begins_like(text.value)
        note = "a text that no known template has written is learned in full"
        if family:
            note = f"a text with markers of {family}, but not as that template writes them, is learned in full"
        notes = (note, *notes_on_unused(record, frozenset({"text"})))
        return Field(Conversation((Turn("text", text.value),)), notes=notes)
    name, turns = rendered
    problems = tuple(
        f"turn {number} of text (assistant) is empty: there is nothing to learn"
        for number, turn in enumerate(turns, 1)
        if turn.role == "assistant" and is_blank(turn.text)
    )
    note = f"a text that the template {name} has written is read as its turns"
    return _with_the_rest(record, Field(turns, problems, (note,)), frozenset({"text"}))
