"""Schema: how the values of one file are read: its format, and what its keys and roles are called here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atomtune.choices import FormatName

#: Format → the keys that identify it; all of them are required.
SIGNS: dict[FormatName, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
#: Other spellings of our keys that are accepted if the right one is absent.
SPELLINGS = {
    "instrution": "instruction",  # a typo in the tutorial's format example
    "conversation": "conversations",
}
#: Keys that mark an answer as wanted or not: TRL's unpaired preferences, LLaMA-Factory's KTO.
WANTED = ("label", "kto_tag")
#: Keys of an assistant's reasoning: in its turn, or in the record if that has a single answer.
REASONING = ("reasoning_content", "reasoning", "thinking")
#: Keys of images, audio and video, with which a record is refused.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
#: Keys of a record; TURN_KEYS are those of a turn inside it.
RECORD_KEYS = frozenset(
    {"instruction", "input", "output", "system", "history", "conversations", "messages"}
    | {"prompt", "completion", "text", "tools", "functions", "chosen", "rejected", *WANTED, *REASONING, *MEDIA}
)
#: The template variable that turns thinking on or off in Qwen3's and other templates.
THINKING = "enable_thinking"
#: The key for template variables, as in TRL's data sets, and the variables that may also be keys of the record itself.
KWARGS = "chat_template_kwargs"
VARIABLES = (THINKING, "documents")
WEIGHTS = ("weight", "loss_weight", "train", "training", "loss")
#: Keys of question and answer in formats that put both into one object.
EXCHANGE_KEYS = (("human", "assistant"), ("user", "assistant"), ("input", "output"))
TURN_KEYS = frozenset({"from", "value", "role", "content", "name", "tool_calls", "function_call", *WEIGHTS, *REASONING})
#: Role names of the formats → ours; `call` is an assistant turn whose text is the JSON of its tool calls.
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
    """The format of one file, and its names for keys and roles."""

    name: FormatName = "alpaca"
    keys: Mapping[str, str] = field(default_factory=dict)  # the file's key → ours
    roles: Mapping[str, str] = field(default_factory=dict)  # the file's role → a role of ROLES
    labels_are_classes: bool = False  # "label" is a class name, not a mark that an answer is wanted

    def rename_keys(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record under our keys; a key that the user mapped overrides one that already has our name."""
        renamed = _renamed(record, self.keys, RECORD_KEYS) if self.keys else record
        for theirs, ours in SPELLINGS.items():
            if theirs in renamed and ours not in renamed:
                renamed = {(ours if key == theirs else key): value for key, value in renamed.items()}
        return renamed

    def rename_turn_keys(self, turn: dict[str, Any]) -> dict[str, Any]:
        """A turn under our keys."""
        return _renamed(turn, self.keys, TURN_KEYS)

    def all_roles(self) -> Mapping[str, str]:
        """Every accepted role name → system, user, assistant, tool or call; the user's mapping overrides ours."""
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
