"""Shared beginnings: found in many texts, whatever else the texts are, and removed without emptying a text."""

import pytest

from atomtune.analysis.shared_beginnings import LEAST_CHARACTERS, LEAST_TEXTS, beginnings_of, without_beginning


def test_shared_beginnings_are_long_prefixes_common_to_many_texts():
    task = "Translate the following sentence into Chinese, please: "
    nested = f"{task}this time as formally as you possibly can, and then "
    texts = [f"{task}{n} birds" for n in range(30)] + [f"{nested}{n * 7} boats" for n in range(30)]
    few = [f"A long beginning that only three records of all these share {n}" for n in range(3)]
    assert beginnings_of([*texts, *few, "short"] * 2) == (nested, task)


@pytest.mark.parametrize("texts", [[], [""] * 50, ["same long text that everybody says again and again"] * 50])
def test_removing_shared_beginnings_never_empties_a_text(texts):
    beginnings = beginnings_of(texts)
    assert [without_beginning(text, beginnings) for text in texts] == texts


def test_a_beginning_counts_from_its_least_length_and_number_of_texts_on():
    task = "Reply in the manner of a sailor: "[:LEAST_CHARACTERS]
    texts = [task, *(f"{task}{chr(97 + number)}" for number in range(LEAST_TEXTS - 1))]  # one of them has nothing else
    assert beginnings_of(texts) == (task,)
    assert beginnings_of(texts[1:]) == ()
    assert beginnings_of([text[1:] for text in texts]) == ()
