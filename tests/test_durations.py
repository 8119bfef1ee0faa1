"""Durations: each is written in the units that fit it, in English and in Chinese."""

import pytest

from atomtune.durations import duration, rough_duration
from atomtune.language import spoken


@pytest.mark.parametrize(
    ("seconds", "english", "chinese"),
    [
        (0.4, "0 s", "0 秒"),
        (59.4, "59 s", "59 秒"),
        (59.6, "1 min 0 s", "1 分 0 秒"),
        (218, "3 min 38 s", "3 分 38 秒"),
        (3599.6, "1 h 0 min", "1 小时 0 分钟"),
        (7512, "2 h 5 min", "2 小时 5 分钟"),
    ],
)
def test_a_measured_time_is_exact_to_the_second_below_an_hour(seconds, english, chinese):
    assert duration(seconds) == english
    with spoken("zh"):
        assert duration(seconds) == chinese


@pytest.mark.parametrize(
    ("seconds", "english", "chinese"),
    [
        (0.1, "1 second", "1 秒"),
        (89, "89 seconds", "89 秒"),
        (218, "4 minutes", "4 分钟"),
        (5390, "90 minutes", "90 分钟"),
        (9000, "2.5 hours", "2.5 小时"),
    ],
)
def test_an_estimated_time_is_rounded_and_never_zero(seconds, english, chinese):
    assert rough_duration(seconds) == english
    with spoken("zh"):
        assert rough_duration(seconds) == chinese
