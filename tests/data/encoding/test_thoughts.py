"""Thoughts: the reasoning at the beginning of an answer's text is moved apart once, and nothing else of the text is."""

import pytest

from atomtune.data.encoding.thoughts import with_thoughts_apart
from atomtune.data.records import Turn


@pytest.mark.parametrize(
    ("text", "reasoning", "rest"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        (" [THINK]Hm.[/THINK]Yes.", "Hm.", "Yes."),
        ("Hm.\n</think>\n\nYes.", "Hm.", "Yes."),  # the prompt opens the thoughts
        ("<think></think>Yes.", "", "Yes."),
    ],
)
def test_thoughts_at_the_beginning_of_a_text_are_moved_apart(text, reasoning, rest):
    assert with_thoughts_apart(Turn("assistant", text)) == Turn("assistant", rest, reasoning=reasoning)


@pytest.mark.parametrize(
    "text",
    [
        "Yes.",
        "Yes. <think>Hm.</think>",
        "</think>\nYes.",  # nothing is thought
        "A model writes </think> after its thoughts.",
        "Between <think> and </think>\nstand thoughts.",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert with_thoughts_apart(Turn("assistant", text)) == Turn("assistant", text)


def test_thoughts_in_both_places_are_kept_once():
    both = Turn("assistant", "<think>\nHm.\n</think>\n\nYes.", reasoning="Hm.")
    assert with_thoughts_apart(both) == Turn("assistant", "Yes.", reasoning="Hm.")
    different = Turn("assistant", "<think>\nHm.\n</think>\n\nYes.", reasoning="Oh.")
    assert with_thoughts_apart(different) == different


def test_a_users_text_has_no_thoughts():
    asked = Turn("user", "<think>\nHm.\n</think>\n\nYes?")
    assert with_thoughts_apart(asked) == asked
