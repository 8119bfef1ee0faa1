"""Replies: generated token ids → the assistant turn, as a client sends it back in its next request.

The inverse of exchanges.py: what a template writes for an assistant turn is parsed into that turn again.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.thoughts import TAGS, opened, with_thoughts_apart
from atomtune.data.records import Turn

#: Control tokens of the harmony format (gpt-oss). A message is: header, <|message|>, text.
_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
_RECIPIENT = re.compile(r"to=(?:functions\.)?(\S+)")
_CALL = re.compile(r"\s*<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
#: Tags that are control tokens in some tokenizers, but belong to the text.
_KEPT = frozenset(tag for tags in TAGS for tag in tags) | {"<tool_call>", "</tool_call>"}


class _Part(NamedTuple):
    """One message of a reply in the harmony format."""

    header: str
    text: str


def read_reply(template: Template, prompt: str, ids: Sequence[int]) -> Turn:
    """Parse the ids that a model generated for a rendered prompt into an assistant turn.

    If generation was cut off inside the thoughts, the turn has no text.
    """
    parts = _segments(template, ids)
    if any(is_control and part == _CHANNEL for part, is_control in parts):
        return _of_channels(parts)
    text = "".join(part for part, is_control in parts if not is_control or part in _KEPT)
    # Llama 2's template writes a space before the stop token.
    between, _, _ = template.after_answer.partition(template.stop)
    text = text.removesuffix(between)
    return _of_text(template, prompt, text)


def shown(template: Template, ids: Sequence[int]) -> str:
    """The text to show for an answer, complete or not: without control tokens and headers."""
    has_channels = _CHANNEL in template.source
    texts: list[str] = []
    in_header = has_channels  # the prompt ends in <|start|>assistant
    for part, is_control in _segments(template, ids):
        if not is_control:
            texts += [] if in_header else [part]
        elif part in _KEPT:
            texts.append(part)
        elif part == _MESSAGE:
            texts += ["\n\n"] if texts else []
            in_header = False
        else:
            in_header = has_channels
    return "".join(texts)


def _segments(template: Template, ids: Sequence[int]) -> list[tuple[str, bool]]:
    """The ids as (text, is_control) segments, in order. A control string made of ordinary tokens is text."""
    tokenizer, controls = template.tokenizer, template.tokens.control_ids
    segments: list[tuple[str, bool]] = []
    run: list[int] = []
    for token in [*ids, None]:
        if token is not None and token not in controls:
            run.append(token)
            continue
        if run:
            segments.append((tokenizer.decode(run, skip_special_tokens=False), False))
            run = []
        if token is not None:
            segments.append((str(tokenizer.convert_ids_to_tokens(token)), True))
    return segments


def _of_channels(parts: Sequence[tuple[str, bool]]) -> Turn:
    messages: list[_Part] = []
    header, text = "", None
    for part, is_control in parts:
        if not is_control and text is None:
            header += part
        elif not is_control:
            text = f"{text}{part}"
        elif part == _CHANNEL:
            header += " "
        elif part == _MESSAGE:
            text = ""
        elif text is not None:  # <|end|>, <|return|>, <|call|>
            messages.append(_Part(header, text))
            header, text = "", None
    if text is not None:
        messages.append(_Part(header, text))

    turn = Turn("assistant", "")
    for message in messages:
        recipient = _RECIPIENT.search(message.header)
        if recipient:
            call = {"name": recipient.group(1), "arguments": _arguments(message.text)}
            turn = replace(turn, calls=(*turn.calls, call))
        elif "analysis" in message.header:
            turn = replace(turn, reasoning="\n".join(filter(None, [turn.reasoning, message.text])))
        else:
            turn = replace(turn, text=turn.text + message.text)
    return turn


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the model wrote invalid JSON: keep its text
        return text


def _of_text(template: Template, prompt: str, text: str) -> Turn:
    lead = template.form.lead if template.form is not None else ""
    thoughts = opened(prompt)
    if thoughts is not None:
        _, closes = thoughts
        reasoning, _, text = text.partition(closes)
        turn = Turn("assistant", text.lstrip("\n"), reasoning=reasoning.strip("\n"))
    elif lead and text.startswith(lead):
        turn = Turn("assistant", text.removeprefix(lead))
    else:
        turn = Turn("assistant", text)
        turn = with_thoughts_apart(turn) if template.knows_thoughts else turn
    return _with_calls_apart(turn)


def _with_calls_apart(turn: Turn) -> Turn:
    """Move each <tool_call>{…}</tool_call> from the text to `calls`; if one is invalid, none is moved."""
    calls: list[dict[str, Any]] = []
    for match in _CALL.finditer(turn.text):
        call = _arguments(match.group(1))
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return turn
        calls.append(call)
    if not calls:
        return turn
    return replace(turn, text=_CALL.sub("", turn.text), calls=tuple(calls))
