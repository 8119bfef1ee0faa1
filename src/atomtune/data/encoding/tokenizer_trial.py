"""Tokenizer trial: the regexes of a tokenizer.json are tried on texts that make a bad one backtrack for hours.

`(a|aa)+$` and `a*a*b` look harmless, but take longer than anybody waits on a few thousand letters. They run in Rust,
where this process cannot stop them, so they are tried in a separate process with limits (limits.py).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from atomtune.data.encoding.token_ids import CannotTokenize, PieceTokenizer
from atomtune.limits import Tripped, try_in_child_process

#: Units of the repeated texts for any pattern: letters, digits, spaces, punctuation, wide and combining characters.
_UNITS = (
    "a",
    "A",
    "1",
    " ",
    "\n",
    "\t",
    "\r\n",
    ".",
    "-",
    "_",
    "'s",
    "中",
    "é",
    "e\u0301",
    "😀",
    " a",
    "a ",
    "1,",
    "<|",
)
#: Characters of a repeated text. A pattern of quadratic time takes a second on it, and hours on a book.
_RUN_CHARACTERS = 4000
#: Put after the repeated text: no pattern expects it, so that all ways to match are tried.
_STRANGE = "\u0394\ue000"
#: Limit for `growth_of`; published tokenizers make up to four characters of one.
MOST_GROWTH = 10_000
#: Maximum number of a pattern's own words that are tried as units.
_MOST_PARTS = 64
_WORDS = re.compile(r"[^\W_]{2,8}|\S")
#: SHA-256 of patterns that passed the trial in this process.
_harmless: set[str] = set()


def tried_tokenizer(tokens: PieceTokenizer) -> Tripped | None:
    """How the patterns fail on repeated texts; None if they pass. Passing is remembered for the process."""
    patterns = patterns_of(tokens.tokenizer)
    digest = hashlib.sha256(patterns.encode("utf-8", "backslashreplace")).hexdigest()
    if not patterns or digest in _harmless:
        return None

    def tokenize(say: Callable[[str], None]) -> None:
        for unit, text in _runs(patterns):
            say(f"{unit * 10}…")
            try:
                tokens.tokenized([text])
            except CannotTokenize:  # it gives up by itself, so a record with such a text will be refused
                continue

    tripped = try_in_child_process(tokenize)
    if tripped is None:
        _harmless.add(digest)
    return tripped


def growth_of(tokenizer: Any) -> int:
    """How many characters the tokenizer's normalizers may make of one.

    Forty rules that each double a letter need a terabyte for the first text that contains it. Rules with a regex, whose
    growth depends on what they match, are not counted here but tried, in `tried_tokenizer`.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None:
        return 1
    growth, begins_with = 1.0, 0.0
    for rule in _rules(json.loads(normalizer.__getstate__())):
        if "prepend" in rule:
            begins_with += len(rule["prepend"])
        pattern = rule.get("pattern")
        if isinstance(pattern, dict) and "String" in pattern:
            times = max(1.0, len(rule["content"]) / max(1, len(pattern["String"])))
            growth, begins_with = growth * times, begins_with * times
    return round(max(growth, begins_with))


def _rules(normalizer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The normalizer and, if it is a sequence, all normalizers in it, at any depth."""
    yield normalizer
    for part in normalizer.get("normalizers", ()):
        yield from _rules(part)


def patterns_of(tokenizer: Any) -> str:
    """The normalizer and pre-tokenizer that contain a regex, as JSON; "" if there is none to try."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [part for part in (getattr(backend, name, None) for name in ("normalizer", "pre_tokenizer")) if part]
    described = [part.__getstate__().decode("utf-8", "replace") for part in parts]
    return "".join(text for text in described if '"Regex"' in text)


def _runs(patterns: str) -> Iterator[tuple[str, str]]:
    """Pairs of a unit and a text that repeats it; the units are common ones and the words of the patterns themselves.

    The text ends with every character of the patterns: a regex that needs a character which the text lacks would fail
    at once and show nothing.
    """
    parts = sorted(set(_WORDS.findall(patterns)), key=lambda part: (len(part), part))[:_MOST_PARTS]
    held = "".join(sorted(set(patterns)))[:_RUN_CHARACTERS]
    for unit in dict.fromkeys((*_UNITS, *parts)):
        yield unit, f"{unit * (_RUN_CHARACTERS // len(unit))}{_STRANGE}{held} 1\n"
