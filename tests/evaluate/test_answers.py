"""What is told of a generated text."""

import pytest

from atomtune.evaluate.answers import calls_in, chrf, exactly_equal, thinks

CALL = '{"name": "weather", "arguments": {"city": "北京"}}'


@pytest.mark.parametrize(
    ("text", "parsed", "known"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", 1, 1),  # Qwen, Hermes
        (f"[TOOL_CALLS] [{CALL}]", 1, 1),  # Mistral
        ('{"name": "weather", "parameters": {"city": "x"}}', 1, 1),  # Llama 3.1
        (f"{CALL}\n{CALL}", 2, 2),
        ('{"name": "stocks", "arguments": {}}', 1, 0),  # a tool that is not at hand
        ('{"name": "weather", "arguments": {"city": "x"', 0, 0),  # cut off
        ('{"city": "x"}', 0, 0),  # an object, but no call
        ("It is sunny {today}.", 0, 0),
        ("", 0, 0),
    ],
)
def test_calls_are_read_in_any_marks(text, parsed, known):
    found = calls_in(text, {"weather"})
    assert (found.parsed, found.known) == (parsed, known)


def test_a_call_within_arguments_is_not_counted():
    nested = '{"name": "weather", "arguments": {"inner": {"name": "weather", "arguments": {}}}}'
    assert calls_in(nested, {"weather"}).parsed == 1


def test_chrf_is_full_for_equal_texts_in_both_languages_and_low_for_others():
    for text in ("Good morning.", "我是灯塔的看守人。"):
        assert chrf(text, text) == pytest.approx(100)
        assert chrf("xyz", text) < 10
    assert 20 < chrf("我是灯塔看守", "我是灯塔的看守人。") < 100


def test_white_space_at_the_ends_is_no_difference():
    assert exactly_equal(" a b \n", "a b")
    assert not exactly_equal("a  b", "a b")


@pytest.mark.parametrize(
    ("text", "expected"), [("<think>\nhm\n</think>\n5", True), ("hm</think>5", True), ("5", False)]
)
def test_a_thought_is_seen(text, expected):
    assert thinks(text) is expected
