"""Tuned model: answers in a program, also several at a time."""

from itertools import zip_longest

import pytest

from atomtune import load
from atomtune.data.encoding.chat_template import CannotExpress
from atomtune.errors import BadSettings


@pytest.fixture(scope="module")
def tuned(by_heart):
    return load(by_heart, dtype="float32")


def test_two_answers_at_a_time_are_those_that_each_gets_alone(tuned):
    """Base and tuned model side by side: each switched the other's adapter off or on in the middle of its answer."""
    alone = tuned.chat("晚安"), "".join(tuned.stream("晚安", base=True, max_new_tokens=20))
    streams = tuned.stream("晚安"), tuned.stream("晚安", base=True, max_new_tokens=20)
    of_tuned, of_base = map("".join, zip(*zip_longest(*streams, fillvalue=""), strict=True))
    assert (of_tuned.strip(), of_base) == alone


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("max_new_tokens", 0), ("seed", 2**64)],
)
@pytest.mark.parametrize("way", ["chat", "stream"])
def test_settings_are_checked_as_those_of_the_command(tuned, way, setting, value):
    with pytest.raises(BadSettings, match=setting):
        list(getattr(tuned, way)("晚安", **{setting: value}))


@pytest.mark.parametrize("message", [{"role": "user", "content": "晚安"}, ["晚安"], None])
def test_what_is_neither_a_text_nor_a_conversation_is_refused_with_the_form_of_one(tuned, message):
    with pytest.raises(BadSettings, match="expected a text, or a list of messages"):
        tuned.chat(message)


def test_a_message_without_content_is_the_templates_to_judge(tuned):
    """A call has no text in OpenAI's form; a message with two keys that are not role and content was a KeyError."""
    with pytest.raises(CannotExpress, match="has no attribute 'content'"):
        tuned.chat([{"role": "user", "text": "晚安"}])
