"""Thoughts: what an assistant thinks before it answers, in `reasoning_content` or inline as <think>…</think>."""

import re
from dataclasses import replace

from atomtune.data.records import Turn

#: The marks that open and close thoughts, in the order in which they are looked for.
TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_INLINE = tuple(re.compile(rf"\s*{re.escape(opens)}(.*?){re.escape(closes)}(.*)", re.DOTALL) for opens, closes in TAGS)


def with_thoughts_apart(turn: Turn) -> Turn:
    """The turn with thoughts that stand at the beginning of its text in `reasoning`; else as it is."""
    if turn.role != "assistant" or turn.reasoning:
        return turn
    for pattern in _INLINE:
        if match := pattern.match(turn.text):
            return replace(turn, reasoning=match.group(1).strip("\n"), text=match.group(2).lstrip("\n"))
    return turn


def mentions_thoughts(text: str) -> bool:
    """Whether a template that looks for thoughts in a text may find some here."""
    return any(tag in text for tags in TAGS for tag in tags)


def opened(prompt: str) -> tuple[str, str] | None:
    """Where a prompt ends in an opening mark: the white space behind it, and the closing mark."""
    bare = prompt.rstrip()
    for opens, closes in TAGS:
        if bare.endswith(opens):
            return prompt[len(bare) :], closes
    return None


def without_opening(header: str) -> str:
    """A header without the mark at its end that opens thoughts, and the white space behind that."""
    bare = header.rstrip()
    for opens, _ in TAGS:
        if bare.endswith(opens):
            return bare.removesuffix(opens)
    return header


def closed(prompt: str) -> bool:
    """Whether a prompt ends in a closing mark: the model is asked to answer without thinking."""
    return prompt.rstrip().endswith(tuple(closes for _, closes in TAGS))


def behind_thoughts(written: str) -> str:
    """An answer as a template writes it, without the block of thoughts at its beginning."""
    for pattern in _INLINE:
        if match := pattern.match(written):
            return match.group(2).lstrip("\n")
    return written


def closing_of_no_thoughts(written: str) -> str:
    """Of an answer that a template writes with an empty block of thoughts, all from its closing mark on; else "".

    Nemotron: `<think></think>72` → `</think>72`
    """
    for pattern in _INLINE:
        match = pattern.match(written)
        if match and not match.group(1).strip():
            return written[match.end(1) :]
    return ""


def is_no_thought(text: str) -> bool:
    """Whether nothing stands here but an empty block of thoughts, or white space."""
    is_block = bool(closing_of_no_thoughts(text)) and not behind_thoughts(text).strip()
    return is_block or not text.strip()
