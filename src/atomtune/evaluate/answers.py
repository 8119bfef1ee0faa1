"""Answers: what can be said of a generated text beside its reference."""

import re
from functools import cache
from typing import Any

from atomtune.data.encoding.thoughts import TAGS, opened

#: The thoughts of gpt-oss: a message in a channel of its own.
_ANALYSIS = re.compile(r"<\|channel\|>analysis<\|message\|>(?!\s*<\|end\|>)")


def chrf(answer: str, reference: str) -> float:
    """sacrebleu's chrF of one answer, 0 to 100: character n-grams, which suit Chinese and English alike."""
    return float(_chrf_metric().sentence_score(answer, [reference]).score)


@cache
def _chrf_metric() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def exactly_equal(answer: str, reference: str) -> bool:
    """Whether the texts are the same, white space at both ends aside."""
    return answer.strip() == reference.strip()


def thinks(answer: str, prompt: str = "") -> bool:
    """Whether the answer holds a thought; an empty block, as of a model that is asked not to think, holds none.

    prompt  as it was sent: some open the thoughts themselves
    """
    begun = opened(prompt)
    if begun is not None:
        return bool(answer.partition(begun[1])[0].strip())
    for opens, closes in TAGS:
        before, mark, behind = answer.partition(opens)
        thoughts = behind.partition(closes)[0] if mark else before.partition(closes)[0] if closes in before else ""
        if thoughts.strip():
            return True
    return _ANALYSIS.search(answer) is not None
