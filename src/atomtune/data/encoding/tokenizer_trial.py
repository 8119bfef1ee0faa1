"""Tokenizer trial: the patterns of a tokenizer.json, tried on texts on which a bad one would search for hours.

`(a|aa)+$` and `a*a*b` look harmless and take, on a few thousand letters, longer than anybody waits. They run in Rust,
where nothing in this process can end them, so they are tried in a process of its own (limits.py).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from atomtune.data.encoding.token_ids import CannotTokenize, PieceTokenizer
from atomtune.limits import Tripped, try_apart

#: What texts have runs of, whatever the pattern: letters, digits, spaces, marks, wide and combined characters.
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
#: Characters of a run. A pattern whose time grows with the square of a text takes a second here, and hours on a book.
_RUN_CHARACTERS = 4000
#: Behind a run: what no pattern waits for, so that all ways to match are tried.
_STRANGE = "\u0394\ue000"
#: Characters that rules without patterns may make of one; published tokenizers make up to four.
MOST_GROWTH = 10_000
#: Parts of a pattern that are tried too.
_MOST_PARTS = 64
_WORDS = re.compile(r"[^\W_]{2,8}|\S")
#: Patterns that came to their end in this process, by a hash.
_harmless: set[str] = set()


def tried_tokenizer(tokens: PieceTokenizer) -> Tripped | None:
    """How the patterns fail on long runs; None where they come to their end, which is tried once a process."""
    patterns = patterns_of(tokens.tokenizer)
    digest = hashlib.sha256(patterns.encode("utf-8", "backslashreplace")).hexdigest()
    if not patterns or digest in _harmless:
        return None

    def tokenize(say: Callable[[str], None]) -> None:
        for unit, text in _runs(patterns):
            say(f"{unit * 10}…")
            try:
                tokens.tokenized([text])
            except CannotTokenize:  # it gives up by itself, and does so again at the record with such a text
                continue

    tripped = try_apart(tokenize)
    if tripped is None:
        _harmless.add(digest)
    return tripped


def growth_of(tokenizer: Any) -> int:
    """How many characters a tokenizer's rules may make of one, before any of them becomes a token.

    Forty of them that each double a letter ask for a terabyte, for the first text that has one. Rules with patterns,
    whose growth depends on what they match, are tried (above) and not counted.
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
    """The normalizers of a sequence, of sequences too."""
    yield normalizer
    for part in normalizer.get("normalizers", ()):
        yield from _rules(part)


def patterns_of(tokenizer: Any) -> str:
    """What takes texts apart before they become tokens, as JSON; "" where there is nothing to be tried."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [part for part in (getattr(backend, name, None) for name in ("normalizer", "pre_tokenizer")) if part]
    described = [part.__getstate__().decode("utf-8", "replace") for part in parts]
    return "".join(text for text in described if '"Regex"' in text)


def _runs(patterns: str) -> Iterator[tuple[str, str]]:
    """A unit, and a text of many; the units are usual ones and what the patterns themselves are written with.

    Every character of a pattern stands at the end: a search for what a text does not hold is over at once.
    """
    parts = sorted(set(_WORDS.findall(patterns)), key=lambda part: (len(part), part))[:_MOST_PARTS]
    held = "".join(sorted(set(patterns)))[:_RUN_CHARACTERS]
    for unit in dict.fromkeys((*_UNITS, *parts)):
        yield unit, f"{unit * (_RUN_CHARACTERS // len(unit))}{_STRANGE}{held} 1\n"
