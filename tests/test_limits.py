"""A stranger's program is tried in a process with limits: it ends, and where it was is known."""

import os
import re
import sys
import time
from pathlib import Path

import pytest

from atomtune.limits import Tripped, trial

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked safely on Linux only")


def test_what_ends_by_itself_trips_nothing():
    assert trial(lambda say: say("record 1")) is None
    assert trial(lambda say: 1 / 0) is None, "an exception is answered where it is raised again"


def test_what_never_ends_is_ended_and_was_at_a_place():
    def endless(say):
        say("record 1")
        say("record 2")
        while True:
            pass

    began = time.monotonic()
    assert trial(endless, seconds=1) == Tripped("time", "record 2")
    assert time.monotonic() - began < 30  # the processors are shared


def test_what_asks_for_too_much_memory():
    def greedy(say):
        say("record 3")
        return "x" * 10**11

    assert trial(greedy) == Tripped("memory", "record 3")


def test_a_regex_is_ended_inside_the_library():
    assert trial(lambda say: re.fullmatch("(a|aa)+$", "a" * 100 + "b"), seconds=1) == Tripped("time", "")


def test_nothing_stays_open_and_nothing_is_written(capfd):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        trial(lambda say: os.write(2, b"not shown"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert capfd.readouterr() == ("", "")
