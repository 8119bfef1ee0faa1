"""Schema: how the values of one file are read: its format, and the names its keys and roles have here."""

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
#: Keys that say whether an answer is wanted: TRL's unpaired preferences, LLaMA-Factory's KTO.
WANTED = ("label", "kto_tag")
#: Where an assistant's thoughts stand: in its turn, or beside the one answer of a record.
REASONING = ("reasoning_content", "reasoning", "thinking")
#: Keys of a record, and keys of a turn inside it.
RECORD_KEYS = frozenset(
    {"instruction", "input", "output", "system", "history", "conversations", "messages"}
    | {"prompt", "completion", "text", "tools", "functions", "chosen", "rejected", *WANTED, *REASONING}
)
#: The template variable by which Qwen3's and others' are asked to think, or not to.
THINKING = "enable_thinking"
#: The key of a record that holds variables of its template, as TRL's data sets have it, and those that stand alone.
KWARGS = "chat_template_kwargs"
VARIABLES = (THINKING, "documents")
WEIGHTS = ("weight", "loss_weight", "train", "loss")
#: What the two sides of an exchange are called where one object holds both.
EXCHANGE_KEYS = (("human", "assistant"), ("user", "assistant"), ("input", "output"))
TURN_KEYS = frozenset({"from", "value", "role", "content", "name", "tool_calls", "function_call", *WEIGHTS, *REASONING})
#: What each format calls a role, and ours; `call` is an assistant's turn whose text is the JSON of its calls.
ROLES: dict[str, str] = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}


@dataclass(frozen=True, slots=True)
class Schema:
    """How the values of one file are read."""

    name: FormatName = "alpaca"
    keys: Mapping[str, str] = field(default_factory=dict)  # the file's key → ours
    roles: Mapping[str, str] = field(default_factory=dict)  # the file's role → a role of ROLES
    labels_are_classes: bool = False  # its "label" is a class of many, not whether an answer is wanted

    def rename_keys(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record under our keys; what the user named stands before a key that is spelled like ours."""
        renamed = _renamed(record, self.keys, RECORD_KEYS) if self.keys else record
        for theirs, ours in SPELLINGS.items():
            if theirs in renamed and ours not in renamed:
                renamed = {(ours if key == theirs else key): value for key, value in renamed.items()}
        return renamed

    def rename_turn_keys(self, turn: dict[str, Any]) -> dict[str, Any]:
        """A turn under our keys."""
        return _renamed(turn, self.keys, TURN_KEYS)

    def all_roles(self) -> Mapping[str, str]:
        """Every role that is read here → system, user, assistant, tool or call; the user's stand before ours."""
        if not self.roles:
            return ROLES
        return ROLES | {theirs: ROLES[ours] for theirs, ours in self.roles.items()}


def _renamed(record: dict[str, Any], keys: Mapping[str, str], known: frozenset[str]) -> dict[str, Any]:
    moved = {theirs: ours for theirs, ours in keys.items() if ours in known}
    values = {ours: record[theirs] for theirs, ours in moved.items() if theirs in record}
    if not values:
        return record
    unmoved = {key: value for key, value in record.items() if key not in moved}
    return unmoved | values
