"""Answers: how a generated text is compared with its reference."""

import pytest

from atomtune.evaluate.answers import chrf, exactly_equal, thinks


def test_chrf_is_100_for_equal_english_and_chinese_texts_and_low_otherwise():
    for text in ("Good morning.", "我是灯塔的看守人。"):
        assert chrf(text, text) == pytest.approx(100)
        assert chrf("xyz", text) < 10
    assert 20 < chrf("我是灯塔看守", "我是灯塔的看守人。") < 100


def test_exact_match_ignores_leading_and_trailing_whitespace():
    assert exactly_equal(" a b \n", "a b")
    assert not exactly_equal("a  b", "a b")


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("<think>\nhm\n</think>\n5", "", True),
        ("[THINK]hm[/THINK]5", "", True),
        ("<think>\nhm, and then the limit", "", True),
        ("<think>\n\n</think>\n\n5", "", False),  # Qwen3 without thinking: every answer begins so
        ("hm</think>5", "", True),
        ("</think>5", "", False),  # Nemotron
        ("hm\n</think>\n5", "Assistant: <think>\n", True),  # DeepSeek-R1, whose prompt opens the thoughts
        ("hm, and then the limit", "Assistant: <think>\n", True),
        ("\n</think>\n5", "Assistant: <think>\n", False),
        ("5", "Assistant: <think>\n\n</think>\n\n", False),
        ("<|channel|>analysis<|message|>hm<|end|>", "", True),
        ("<|channel|>analysis<|message|><|end|><|start|>assistant", "", False),
        ("5", "", False),
        ("", "", False),
    ],
)
def test_a_thinking_block_is_detected_and_an_empty_one_does_not_count(text, prompt, expected):
    assert thinks(text, prompt) is expected
