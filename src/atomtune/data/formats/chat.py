"""Chats: records that are conversations: ShareGPT, OpenAI's messages, prompt and completion, rendered texts.

Before: formats.py.  After: template.py. All answers are learned, each as often as its weight says (once, unsaid).
"""

from typing import Any

from atomtune.data.formats.fields import Reading, is_blank
from atomtune.data.formats.messages import turns_of_list
from atomtune.data.formats.rendered_text import turns_of
from atomtune.data.formats.schema import SIGNS
from atomtune.data.records import Record, Refusal, Turn

_BESIDE = frozenset({"system", "tools", "functions"})


def sharegpt_record(value: dict[str, Any], reading: Reading) -> Record | Refusal:
    """{"conversations": [{"from": "human", "value": …}, …]}"""
    return _listed(value, "conversations", reading)


def messages_record(value: dict[str, Any], reading: Reading) -> Record | Refusal:
    """{"messages": [{"role": "user", "content": …}, …]}"""
    return _listed(value, "messages", reading)


def _listed(value: dict[str, Any], key: str, reading: Reading) -> Record | Refusal:
    if key not in value:
        return reading.refused()
    turns = turns_of_list(value[key], key, reading)
    return _ended(value, turns, frozenset({key}), reading)


def _ended(value: dict[str, Any], turns: list[Turn], used: frozenset[str], reading: Reading) -> Record | Refusal:
    tools: tuple[Any, ...] = ()
    if len(value) > len(used):
        turns = reading.after_system(value, turns)
        tools = reading.tools(value)
        reading.note_unused(value, used | _BESIDE)
    return reading.end(turns, tools)


def prompt_record(value: dict[str, Any], reading: Reading) -> Record | Refusal:
    """{"prompt": …, "completion": …}, each a text or a list of messages."""
    used = {*SIGNS["prompt"]}
    if isinstance(value.get("label"), bool):  # TRL's unpaired preferences: an answer, and whether it is wanted
        used.add("label")
        if not value["label"]:
            reading.problems.append("label is false: an answer that is not wanted is not trained on")
    if reading.problems:
        return reading.refused()
    prompt, completion = value["prompt"], value["completion"]
    asked = turns_of_list(prompt, "prompt", reading) if isinstance(prompt, list) else _one("user", prompt, reading)
    if isinstance(completion, list):
        said = turns_of_list(completion, "completion", reading)
        if not reading.problems and not any(turn.role == "assistant" for turn in said):
            reading.problems.append("completion holds no turn of an assistant: there is nothing to learn")
    else:
        said = _one("assistant", completion, reading)
    if any(turn.role == "assistant" for turn in asked):
        reading.notes.add('the answers inside "prompt" are learned too (--learn last leaves them out)')
    return _ended(value, asked + said, frozenset(used), reading)


def _one(role: Any, value: object, reading: Reading) -> list[Turn]:
    key, why = ("prompt", "to answer") if role == "user" else ("completion", "to learn")
    text = reading.text(value, key)
    if isinstance(value, str) and is_blank(text):
        reading.problems.append(f"{key} is empty: there is nothing {why}")
    return [Turn(role, text)]


def text_record(value: dict[str, Any], reading: Reading) -> Record | Refusal:
    """{"text": …}: what a known template has written is taken apart again; another text is learned whole."""
    if reading.problems:
        return reading.refused()
    text = reading.text(value["text"], "text")
    if reading.problems:
        return reading.refused()
    if is_blank(text):
        reading.problems.append("text is empty: there is nothing to learn")
        return reading.refused()
    rendered = turns_of(text)
    if rendered is None:
        reading.notes.add("a text that no known template has written is learned whole")
        reading.note_unused(value, frozenset({"text"}))
        return reading.end([Turn("text", text)])
    name, turns = rendered
    for number, turn in enumerate(turns, 1):
        if turn.role == "assistant" and is_blank(turn.text) and not turn.calls:
            reading.problems.append(f"turn {number} of text (assistant) is empty: there is nothing to learn")
    reading.notes.add(f"a text that the template {name} has written is read as its turns")
    return _ended(value, list(turns), frozenset({"text"}), reading)
