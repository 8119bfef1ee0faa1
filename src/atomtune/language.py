"""Language: what the console says, in English or in the language that is spoken.

The source speaks English alone, and a finished sentence is looked up in a catalogue (catalogue.py). English itself
needs one thing: the source writes every count as several, and `singular` mends `1 records are`.
Files, `--json` and errors in programs stay English.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from atomtune.catalogue import LIST_MARKS, Catalogue

LANGUAGES = ("en", "zh")
FOLDER = Path(__file__).parent / "locale"

#: What is counted, and what is said of it: `1 other tensors are`. A file's name, `1 records.txt`, is neither.
_NOUNS = (
    "adapters answers batches bytes calls cells characters columns conversations copies epochs examples files GPUs "
    "groups hours labels layers lines matrices minutes models numbers parameters places positions processes prompts "
    "questions records rows seconds settings steps targets tensors texts tokens trials turns updates weights"
)
_ONE_OF_A_KIND = re.compile(
    rf"(?<![\w.,:/-])1 ((?:(?:adapted|exact|general|held-out|learned|other|similar) )?)({'|'.join(_NOUNS.split())})\b"
    r"(?![./\w-]\w)(?: (are|were|have|do|make|hold|end|come)\b)?"
)
_IRREGULAR = {"matrices": "matrix", "copies": "copy", "batches": "batch", "processes": "process"}
_VERBS = {"are": "is", "were": "was", "have": "has", "do": "does"}


def singular(text: str) -> str:
    """English with a count of one as it should be: `1 records are held out` → `1 record is held out`."""

    def mended(match: re.Match[str]) -> str:
        adjective, noun, verb = match.groups()
        text = f"1 {adjective}{_IRREGULAR.get(noun, noun.removesuffix('s'))}"
        return text if verb is None else f"{text} {_VERBS.get(verb, verb + 's')}"

    return _ONE_OF_A_KIND.sub(mended, text)


_language = "en"  # that is spoken


def translated(text: str, *, is_ours: bool = True) -> str:
    """A text in the language that is spoken; is_ours: False where it may hold another's words."""
    return singular(text) if _language == "en" else catalogue(_language).translated(text, is_ours=is_ours)


def listed(parts: Iterable[str]) -> str:
    """Texts in the language that is spoken, one behind the other."""
    return (", " if _language == "en" else LIST_MARKS[", "]).join(parts)


def message(text: str) -> str:
    """The text as it is; marks a single word of the source as one that `translated` gets later."""
    return text


@contextlib.contextmanager
def spoken(language: str) -> Iterator[None]:
    """Have `translated` give this language."""
    global _language  # noqa: PLW0603  # one process speaks one language
    before, _language = _language, language
    try:
        yield
    finally:
        _language = before


def language_spoken() -> str:
    return _language


def in_chinese(text: str) -> str:
    """A message of ours, whatever language is spoken, for a page that holds both."""
    return catalogue("zh").translated(text, is_ours=True)


@functools.cache
def catalogue(language: str) -> Catalogue:
    return Catalogue(json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8")))


def language_of(environment: Mapping[str, str] = os.environ) -> str:
    """ATOMTUNE_LANGUAGE, else the locale; English where neither is Chinese."""
    for name in ("ATOMTUNE_LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        if environment.get(name):
            return "zh" if environment[name].lower().startswith("zh") else "en"
    return "en"
