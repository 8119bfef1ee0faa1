"""Language: translates what the console prints into the language in use.

The source is in English, and a finished sentence is translated with a catalogue (catalogue.py). In English, counts are
written in the plural, and `singular` corrects `1 records are`.
Files, `--json` and the errors of the API stay English.
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

#: Nouns with counts and the verbs after them: `1 other tensors are`. A file name, `1 records.txt`, does not match.
_NOUNS = (
    "adapters answers batches bytes calls cells characters columns conversations copies cores epochs examples files "
    "GPUs groups hours labels layers lines matrices minutes models numbers parameters places positions processes "
    "prompts questions records rows seconds settings steps targets tensors texts tokens trials turns updates weights"
)
_KINDS = "adapted evaluation exact general greedy held-out learned more other prompt similar such target"
_ANY_NOUN = rf"(?:(?:{'|'.join(_KINDS.split())}) )?(?:{'|'.join(_NOUNS.split())})"
_ONE_OF_A_KIND = re.compile(
    rf"(?<![\w.,:/-])1 ({_ANY_NOUN})\b(?![./\w-]\w)(?: (are|were|have|do|make|hold|end|come)\b)?"
)
#: The verb after `1 of 3 records are`, `1 of those are`; not in `activations of 1 of 3 layers are`.
_ONE_OF_SEVERAL = re.compile(
    rf"(?<![\w.,:/-])(?<!\bof )(1 of (?:(?:the|its|these|those) )?(?:[\d,]+ )?(?:{_ANY_NOUN}|used)?) ?"
    r"\b(are|were|have|differ)\b"
)
_IRREGULAR = {"matrices": "matrix", "copies": "copy", "batches": "batch", "processes": "process"}
_VERBS = {"are": "is", "were": "was", "have": "has", "do": "does"}


def singular(text: str) -> str:
    """English with counts of one corrected: `1 records are held out` → `1 record is held out`."""

    def one(match: re.Match[str]) -> str:
        nouns, verb = match.groups()
        kind, space, noun = nouns.rpartition(" ")
        text = f"1 {kind}{space}{_IRREGULAR.get(noun, noun.removesuffix('s'))}"
        return text if verb is None else f"{text} {_VERBS.get(verb, verb + 's')}"

    def one_of_several(match: re.Match[str]) -> str:
        return f"{match[1].rstrip()} {_VERBS.get(match[2], match[2] + 's')}"

    return _ONE_OF_SEVERAL.sub(one_of_several, _ONE_OF_A_KIND.sub(one, text))


_language = "en"  # the language in use


def translated(text: str, *, is_ours: bool = True) -> str:
    """A text in the language in use. is_ours: False if it may contain other programs' words."""
    return singular(text) if _language == "en" else catalogue(_language).translated(text, is_ours=is_ours)


def listed(parts: Iterable[str]) -> str:
    """Texts joined by commas of the language in use."""
    return (", " if _language == "en" else LIST_MARKS[", "]).join(parts)


def message(text: str) -> str:
    """The text itself; marks a word in the source that is translated later, for tools.messages."""
    return text


@contextlib.contextmanager
def spoken(language: str) -> Iterator[None]:
    """Within this context, `translated` returns this language."""
    global _language  # noqa: PLW0603  # one process uses one language at a time
    before, _language = _language, language
    try:
        yield
    finally:
        _language = before


def language_spoken() -> str:
    return _language


def in_chinese(text: str) -> str:
    """A message of ours in Chinese, for a page with both languages."""
    return catalogue("zh").translated(text, is_ours=True)


@functools.cache
def catalogue(language: str) -> Catalogue:
    return Catalogue(json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8")))


def language_of(environment: Mapping[str, str] = os.environ) -> str:
    """The language of ATOMTUNE_LANGUAGE, else of the locale; English unless that is Chinese."""
    for name in ("ATOMTUNE_LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        if environment.get(name):
            return "zh" if environment[name].lower().startswith("zh") else "en"
    return "en"
