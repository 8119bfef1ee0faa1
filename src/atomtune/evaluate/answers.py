"""Answers: a generated text compared with its reference."""

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
    """Whether the texts are the same, apart from white space at both ends."""
    return answer.strip() == reference.strip()


def thinks(answer: str, prompt: str = "") -> bool:
    """Whether the answer contains a thought. An empty block, which Qwen3 writes when told not to think, does not count.

    prompt  as it was sent; some prompts end with the tag that opens the thoughts
    """
    begun = opened(prompt)
    if begun is not None:
        return bool(answer.partition(begun[1])[0].strip())
    for opens, closes in TAGS:
        before, mark, after = answer.partition(opens)
        thoughts = ""
        if mark:
            thoughts = after.partition(closes)[0]
        elif closes in before:
            thoughts = before.partition(closes)[0]
        if thoughts.strip():
            return True
    return _ANALYSIS.search(answer) is not None
