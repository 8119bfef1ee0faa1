"""Thoughts: the assistant's reasoning before an answer, in `reasoning_content` or inline as <think>…</think>."""

import re
from dataclasses import replace

from atomtune.data.records import Turn

#: The tags that open and close thoughts, in the order in which they are tried.
TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_INLINE = tuple(re.compile(rf"\s*{re.escape(opens)}(.*?){re.escape(closes)}(.*)", re.DOTALL) for opens, closes in TAGS)
_LINE_ENDS = re.compile(r"[ \t\r]*\n")


def with_thoughts_apart(turn: Turn) -> Turn:
    """Move the thoughts at the beginning of an assistant's text to `reasoning`; any other turn is unchanged.

    If `reasoning` already has the same thoughts, they are only removed from the text; if it has others, the turn is
    unchanged.
    """
    if turn.role != "assistant":
        return turn
    thoughts, text = _apart(turn.text)
    if text is None or (turn.reasoning and thoughts.strip() != turn.reasoning.strip()):
        return turn
    return replace(turn, reasoning=turn.reasoning or thoughts, text=text)


def _apart(text: str) -> tuple[str, str | None]:
    """Split a text into the thoughts at its beginning and the rest; ("", None) if it begins with none.

    The opening tag may be missing: if the prompt ends with it (DeepSeek-R1, Qwen3-Thinking), a server returns only what
    the model writes after it.
    """
    for pattern in _INLINE:
        if match := pattern.match(text):
            return match.group(1).strip("\n"), match.group(2).lstrip("\n")
    for opens, closes in TAGS:
        thoughts, mark, rest = text.partition(closes)
        if mark and thoughts.strip() and opens not in thoughts and _LINE_ENDS.match(rest):
            return thoughts.strip("\n"), rest.lstrip("\r\n")
    return "", None


def problem_of_thoughts(turn: Turn) -> str:
    """What is wrong with the thoughts of an assistant turn; "" if nothing is.

    Refused are turns with nothing but thoughts, whose generation was cut off, and turns with two different thoughts.
    """
    if not mentions_thoughts(turn.text):
        return ""
    for opens, closes in TAGS:
        if turn.text.lstrip().startswith(opens) and closes not in turn.text:
            return f"ends inside its thoughts, without {closes}: it was cut off"
    thoughts, text = _apart(turn.text)
    if text is not None and turn.reasoning.strip() and thoughts.strip() not in ("", turn.reasoning.strip()):
        return "gives its reasoning twice, and differently; leave one out"
    is_cut_off = text is not None and not text.strip() and not turn.calls
    return "has no answer after its thoughts: it was cut off" if is_cut_off else ""


def mentions_thoughts(text: str) -> bool:
    """Whether the text contains a tag for thoughts, which some templates search for."""
    return any(tag in text for tags in TAGS for tag in tags)


def opened(prompt: str) -> tuple[str, str] | None:
    """If a prompt ends with an opening tag: the white space after it, and its closing tag. Else None."""
    bare = prompt.rstrip()
    for opens, closes in TAGS:
        if bare.endswith(opens):
            return prompt[len(bare) :], closes
    return None


def without_opening(header: str) -> str:
    """The header without an opening tag, and white space after it, at its end."""
    bare = header.rstrip()
    for opens, _ in TAGS:
        if bare.endswith(opens):
            return bare.removesuffix(opens)
    return header


def closed(prompt: str) -> bool:
    """Whether a prompt ends with a closing tag: the model is to answer without thinking."""
    return prompt.rstrip().endswith(tuple(closes for _, closes in TAGS))


def after_thoughts(written: str) -> str:
    """A rendered answer without the block of thoughts at its beginning."""
    for pattern in _INLINE:
        if match := pattern.match(written):
            return match.group(2).lstrip("\n")
    return written


def closing_of_no_thoughts(written: str) -> str:
    """The part of a rendered answer from the closing tag on, if it begins with an empty block of thoughts; else "".

    Nemotron: `<think></think>72` → `</think>72`
    """
    for pattern in _INLINE:
        match = pattern.match(written)
        if match and not match.group(1).strip():
            return written[match.end(1) :]
    return ""


def is_no_thought(text: str) -> bool:
    """Whether the text is empty, white space, or an empty block of thoughts."""
    is_block = bool(closing_of_no_thoughts(text)) and not after_thoughts(text).strip()
    return is_block or not text.strip()
