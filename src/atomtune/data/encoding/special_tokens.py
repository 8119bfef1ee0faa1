"""Shield: control strings in a record's own texts, hidden while a template renders and found again in what it wrote.

Law 2 of the tokens (text from a record never becomes a control token) begins here: each such string's place is handed
on as a break, which no token may reach across (ids.py).
"""

import re
from collections.abc import Mapping
from typing import Any

from atomtune.data.records import Piece

_MARK, _END = "\ufdd0", "\ufdd1"  # Unicode noncharacters: they mean nothing in any text
_HIDDEN = re.compile(f"{_MARK}control(\\d+){_END}")
#: Stands for an answer whose surroundings are looked at.
ANSWER = f"{_MARK}answer{_END}"


def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches every string that this tokenizer reads as a control token."""
    return _patterns(tokenizer)[0]


def _patterns(tokenizer: Any) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """(control strings, control strings and what imitates the shield), kept with the tokenizer."""
    cached = getattr(tokenizer, "_atomtune_controls", None)
    size = len(tokenizer)
    if cached is None or cached[0] != size:
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        # One-character tokens cannot be broken, and no tokenizer in use has one as a control token.
        longest_first = sorted((s for s in special if len(s) > 1), key=len, reverse=True)
        controls = "|".join(map(re.escape, longest_first)) or r"(?!)"
        cached = (size, re.compile(controls), re.compile(f"{_MARK}|{controls}"))
        tokenizer._atomtune_controls = cached
    return cached[1], cached[2]


class Shield:
    """Hides control strings in texts, and gives what was rendered from them back as a Piece with its breaks."""

    def __init__(self, tokenizer: Any) -> None:
        self._controls, self._to_hide = _patterns(tokenizer)
        self._found: list[str] = []

    def hide(self, value: Any) -> Any:
        """The same value with the control strings in its texts, at any depth, replaced by marks."""
        if isinstance(value, str):
            return self._to_hide.sub(self._mark, value) if self._to_hide.search(value) else value
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(one) for one in value]
        return value

    def _mark(self, match: re.Match[str]) -> str:
        self._found.append(match.group())
        return f"{_MARK}control{len(self._found) - 1}{_END}"

    def piece(self, text: str, *, learn: bool) -> Piece:
        """What was rendered, with its own texts back in it and a break inside each control string among them."""
        if not self._found:
            return Piece(text, learn)
        parts, breaks, at, length = [], [], 0, 0
        for match in _HIDDEN.finditer(text):
            control = self._found[int(match.group(1))]
            parts += [text[at : match.start()], control]
            length += match.start() - at
            if control != _MARK:
                breaks.append(length + 1)
            length, at = length + len(control), match.end()
        return Piece("".join([*parts, text[at:]]), learn, breaks=tuple(breaks))

    def whole(self, text: str, *, learn: bool) -> Piece:
        """A record's own text, rendered by nobody."""
        return Piece(text, learn, breaks=tuple(m.start() + 1 for m in self._controls.finditer(text)))
