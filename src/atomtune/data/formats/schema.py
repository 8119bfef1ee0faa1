"""Schema: how the values of one file are read: its format, and the names that the user's keys and roles have here.

Before: formats.detect_schema makes one.  After: formats.to_record reads every value by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atomtune.choices import FormatName

#: The keys that together are the sign of a format.
SIGNS: dict[FormatName, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
#: Other spellings of a key of ours that are read without being asked for; they give way to the right one.
SPELLINGS = {
    "instrution": "instruction",  # stands in the tutorial's own format example
    "conversation": "conversations",
}
#: Keys of a record, and keys of a turn inside it.
RECORD_KEYS = frozenset(
    {"instruction", "input", "output", "system", "history", "conversations", "messages"}
    | {"prompt", "completion", "text", "tools", "functions"}
)
WEIGHTS = ("weight", "loss_weight", "train", "loss")
REASONING = ("reasoning_content", "reasoning", "thinking")
TURN_KEYS = frozenset({"from", "value", "role", "content", "name", "tool_calls", "function_call", *WEIGHTS, *REASONING})
#: What each format calls a role, and ours; `call` is an assistant's turn whose text is the JSON of its calls.
ROLES: dict[str, str] = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
    "function_call": "call",
}


@dataclass(frozen=True, slots=True)
class Schema:
    """How the values of one file are read."""

    name: FormatName = "alpaca"
    keys: Mapping[str, str] = field(default_factory=dict)  # the user's key → ours
    roles: Mapping[str, str] = field(default_factory=dict)  # the user's role → ours

    def rename_keys(self, value: dict[str, Any]) -> dict[str, Any]:
        """The value under our keys; what the user named stands before a key that is spelled like ours."""
        renamed = _renamed(value, self.keys, RECORD_KEYS) if self.keys else value
        for theirs, ours in SPELLINGS.items():
            if theirs in renamed and ours not in renamed:
                renamed = {(ours if key == theirs else key): one for key, one in renamed.items()}
        return renamed

    def rename_turn_keys(self, value: dict[str, Any]) -> dict[str, Any]:
        """A turn under our keys."""
        return _renamed(value, self.keys, TURN_KEYS)


def _renamed(value: dict[str, Any], keys: Mapping[str, str], known: frozenset[str]) -> dict[str, Any]:
    given = {ours: value[theirs] for theirs, ours in keys.items() if ours in known and theirs in value}
    if not given:
        return value
    moved = {theirs for theirs, ours in keys.items() if ours in known}
    return {key: one for key, one in value.items() if key not in moved} | given
