"""Thoughts: what an assistant thinks before it answers, in `reasoning_content` or inline as <think>…</think>."""

import re
from dataclasses import replace

from atomtune.data.records import Turn

#: The marks that open and close thoughts, in the order in which they are looked for.
TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_INLINE = tuple(re.compile(rf"\s*{re.escape(opens)}(.*?){re.escape(closes)}(.*)", re.DOTALL) for opens, closes in TAGS)
_LINE_ENDS = re.compile(r"[ \t\r]*\n")


def with_thoughts_apart(turn: Turn) -> Turn:
    """The turn with thoughts that stand at the beginning of its text in `reasoning`; else as it is.

    Where they stand in both, they are one thing.
    """
    if turn.role != "assistant":
        return turn
    thoughts, text = _apart(turn.text)
    if text is None or (turn.reasoning and thoughts.strip() != turn.reasoning.strip()):
        return turn
    return replace(turn, reasoning=turn.reasoning or thoughts, text=text)


def _apart(text: str) -> tuple[str, str | None]:
    """The thoughts that a text begins with, and what stands behind them; None where it begins with none.

    The mark that opens them may be missing. Where a prompt ends in it (DeepSeek-R1, Qwen3-Thinking), a server gives
    back what the model writes behind it.
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
    """Why an assistant's turn is not learned for what it thinks; "" where nothing is wrong.

    It says nothing else, as an answer does that was cut off when it was made, or thinks two different things.
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


def after_thoughts(written: str) -> str:
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
    is_block = bool(closing_of_no_thoughts(text)) and not after_thoughts(text).strip()
    return is_block or not text.strip()
