"""Prompts: the prompts for an engine, of several kinds, from the run's own records if they have them.

Kinds: one turn, several turns, a system text, Chinese, tools, and text that looks like a control string but is not.
Records with a real control string are left out: an engine reads it as a control token, training as text.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atomtune.data.encoding.chat_template import CannotExpress, Message, Template
from atomtune.data.encoding.exchanges import as_one_piece, exchanges_of
from atomtune.data.records import Record
from atomtune.engines.engine import Request
from atomtune.errors import BadData
from atomtune.language import message

#: Our own prompts, for kinds that the records lack. A prompt with a role that the template lacks is left out.
OWN: tuple[tuple[str, tuple[Message, ...]], ...] = (
    ("one turn", ({"role": "user", "content": "Name a fruit."},)),
    ("Chinese", ({"role": "user", "content": "请用一句话介绍你自己。"},)),
    (
        "several turns",
        (
            {"role": "user", "content": "Name a colour."},
            {"role": "assistant", "content": "Blue."},
            {"role": "user", "content": "And one more?"},
        ),
    ),
    (
        "system",
        ({"role": "system", "content": "Answer in one short line."}, {"role": "user", "content": "What is rain?"}),
    ),
    ("look-alike", ({"role": "user", "content": "What does <|end_of_file|> in [brackets] and < /s > mean?"},)),
)
#: Their origin.
OUR_OWN = "our own"
KINDS = (
    "one turn",
    "several turns",
    "system",
    message("Chinese"),
    "tools",
    message("look-alike"),
)
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_LOOK_ALIKE = re.compile(r"<[|｜/]?\w+[|｜]?>|\[/?[A-Z_]{2,}\]")


@dataclass(frozen=True)
class CertPrompt:
    """A request, the ids that training makes of it, and the record's answer; our own prompts have no answer."""

    kind: str
    request: Request
    prompt_ids: tuple[int, ...]
    reference_ids: tuple[int, ...]
    origin: str


def choose_prompts(
    records: Iterable[Record], template: Template, *, count: int, max_tokens: int, positions: int | None = None
) -> list[CertPrompt]:
    """`count` prompts: one of each kind if the records have it, else our own, then further ones from the records.

    max_tokens  of a record's prompt with its answer
    positions   how many tokens the base has positions for; our own prompts that leave no room for an answer are left
                out; None: no limit
    Raises BadData if none can be written.
    """
    candidates = [prompt for record in records for prompt in _of_record(record, template, max_tokens=max_tokens)]
    chosen: list[CertPrompt] = []
    for kind in KINDS:
        chosen += [prompt for prompt in candidates if prompt.kind == kind][:1]
    there = {prompt.kind for prompt in chosen}
    for kind, messages in OWN:
        if kind not in there:
            own = _own(kind, messages, template)
            chosen += [prompt for prompt in own if positions is None or len(prompt.prompt_ids) < positions]
    chosen += [prompt for prompt in candidates if prompt not in chosen]
    if not chosen:
        raise BadData(
            "This template cannot write any of the prompts, or its own text leaves no room for one among the base's "
            "positions, so there is nothing to ask an engine."
        )
    return chosen[: max(count, 1)]


def _of_record(record: Record, template: Template, *, max_tokens: int) -> list[CertPrompt]:
    """The last answer of a record as a request; empty if it is too long, no dialogue, or has control strings."""
    if record.turns[-1].role == "text" or not record.learned:
        return []
    at = record.learned[-1]
    try:
        exchange = exchanges_of(template, record)[-1]
    except CannotExpress:
        return []
    prompt, answer = as_one_piece(exchange.prompt), exchange.answer
    if prompt.breaks or answer.breaks:
        return []
    prompt_ids, answer_ids = template.tokens.ids_of([prompt, answer])
    stop = template.tokenizer.convert_tokens_to_ids(exchange.stop)
    if not prompt_ids or len(prompt_ids) + len(answer_ids) + 1 > max_tokens:
        return []
    messages = tuple(template.messages(record.turns[:at]))
    return [
        CertPrompt(
            kind_of(messages, record.tools),
            Request(messages, record.tools, {**template.variables, **record.variables}),
            tuple(prompt_ids),
            (*answer_ids, stop),
            record.origin,
        )
    ]


def _own(kind: str, messages: Sequence[Message], template: Template) -> list[CertPrompt]:
    try:
        piece = template.prompt_piece(messages)
    except CannotExpress:
        return []
    (ids,) = template.tokens.ids_of([piece])
    return [CertPrompt(kind, Request(tuple(messages), (), template.variables), tuple(ids), (), OUR_OWN)]


def kind_of(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
    """The rarest kind that fits a request."""
    text = "\n".join(str(message.get("content", "")) for message in messages)
    roles = [message["role"] for message in messages]
    if tools:
        return "tools"
    if _LOOK_ALIKE.search(text):
        return "look-alike"
    if roles.count("assistant"):
        return "several turns"
    if "system" in roles:
        return "system"
    return "Chinese" if _CHINESE.search(text) else "one turn"
