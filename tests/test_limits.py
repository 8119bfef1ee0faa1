"""Foreign code is tried in a process with limits: it ends, and the place where it was is known."""

import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from atomtune import limits
from atomtune.limits import Tripped, try_in_child_process
from tests.tiny import tokenizer_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked safely on Linux only")


def test_code_that_ends_by_itself_trips_no_limit():
    assert try_in_child_process(lambda say: say("record 1")) is None
    assert try_in_child_process(lambda say: 1 / 0) is None, "an exception is answered where it is raised again"


def test_endless_code_is_stopped_and_its_last_place_reported():
    def endless(say):
        say("record 1")
        say("record 2")
        while True:
            pass

    began = time.monotonic()
    assert try_in_child_process(endless, seconds=1) == Tripped("time", "record 2", 1)
    assert time.monotonic() - began < 30  # a wide margin, because the processors are shared


def test_code_that_allocates_too_much_memory_is_stopped():
    def greedy(say):
        say("record 3")
        return "x" * 10**11

    assert try_in_child_process(greedy) == Tripped("memory", "record 3")


def test_a_runaway_regex_is_stopped_inside_the_library():
    assert try_in_child_process(lambda say: re.fullmatch("(a|aa)+$", "a" * 100 + "b"), seconds=1) == Tripped(
        "time", "", 1
    )


def test_a_trial_leaks_no_file_descriptors_and_prints_nothing(capfd):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        try_in_child_process(lambda say: os.write(2, b"not shown"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert capfd.readouterr() == ("", "")


def test_code_waiting_for_a_lock_trips_no_limit(monkeypatch):
    # A forked process may find a lock held by a thread that was not forked. That says nothing about the code on trial.
    monkeypatch.setattr(limits, "CLOCK_SECONDS", 1)
    assert try_in_child_process(lambda say: time.sleep(60)) is None


def test_code_that_computed_for_most_of_its_time_is_stopped_by_the_clock(monkeypatch):
    # On a busy machine the clock may end it before its processor time is over.
    monkeypatch.setattr(limits, "CLOCK_SECONDS", 4)

    def slow(say):
        while time.process_time() < 0.8:
            sum(range(10**6))
        time.sleep(60)

    assert try_in_child_process(slow, seconds=1) == Tripped("time", "", 1)


def test_both_limits_of_time_can_begin_anew_at_each_place(monkeypatch):
    # The places are the records of a file: together they may take as long as they need.
    def compute(seconds):
        began = time.process_time()
        while time.process_time() < began + seconds:
            sum(range(10**6))

    def slow(say):
        for place in ("record 1", "record 2"):
            say(place)
            compute(0.8)

    assert try_in_child_process(slow, seconds=1, each_place=True) is None
    halves = itertools.count(step=limits.CLOCK_SECONDS // 2)  # half of the time passes whenever somebody looks
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=halves.__next__, process_time=time.process_time))

    def places(say):
        compute(1.6)  # a process that has computed less than half of the limit is not judged by the clock
        for number in range(4):
            say(f"record {number}")
            time.sleep(0.1)

    assert try_in_child_process(places, seconds=3, each_place=True) is None
    assert try_in_child_process(places, seconds=3) == Tripped("time", "record 0", 3)


def test_the_limits_hold_where_the_system_allows_even_less():
    # `ulimit -v`, as on many clusters: no limit may be raised above it, and the trial ended at once, as if in order.
    program = """
import resource
from atomtune import limits
most = limits._address_space() + 10**9
resource.setrlimit(resource.RLIMIT_AS, (most, most))
assert limits.try_in_child_process(lambda say: "x" * 10**11) == limits.Tripped("memory", "")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_tokenizer_that_already_used_its_threads_can_be_tried(tmp_path):
    # A fork has no copies of tokenizers' threads: with TOKENIZERS_PARALLELISM=true the trial waited for them forever.
    file = tmp_path / "tokenizer.json"
    tokenizer_of("bytes").backend_tokenizer.save(str(file))
    program = """
import sys, time
from tokenizers import Tokenizer
from atomtune import limits
tokenizer = Tokenizer.from_file(sys.argv[1])
tokenizer.encode_batch(["many texts"] * 1000)
limits.CLOCK_SECONDS = 20
began = time.monotonic()
assert limits.try_in_child_process(lambda say: tokenizer.encode_batch(["many texts"] * 1000)) is None
assert time.monotonic() - began < 15, "it waited for the clock"
"""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    subprocess.run([sys.executable, "-c", program, file], check=True, env=environment, timeout=120)


@pytest.mark.slow
def test_the_package_is_imported_where_a_system_has_no_such_limits():
    # Windows has neither of these modules nor fork. Libraries, which handle that themselves, may still import them.
    program = """
import builtins, importlib, pkgutil
imported = builtins.__import__

def on_windows(name, globals=None, locals=None, fromlist=(), level=0):
    hidden = name in ("resource", "fcntl") or (name == "multiprocessing.context" and "ForkContext" in (fromlist or ()))
    if hidden and (globals or {}).get("__name__", "").startswith("atomtune"):
        raise ImportError(name)
    return imported(name, globals, locals, fromlist, level)

builtins.__import__ = on_windows
import atomtune
for module in pkgutil.walk_packages(atomtune.__path__, "atomtune."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError:  # a package of an extra
        pass
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_without_proc_only_the_time_limit_applies(monkeypatch):
    """There a process's memory is unknown. The trial failed because of that, and the foreign code had no limits."""

    def unmounted() -> int:
        raise FileNotFoundError(2, "No such file or directory", "/proc/self/statm")

    def endless(say):
        say("record 1")
        while True:
            pass

    monkeypatch.setattr(limits, "_address_space", unmounted)
    assert try_in_child_process(endless, seconds=1) == Tripped("time", "record 1", 1)


def test_most_memory_held_excludes_the_parent_process():
    held = "from atomtune.limits import most_memory_held; print(most_memory_held())"
    start = f"much = b'1' * 10**9; import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
    assert 10**6 < int(done.stdout) < 5 * 10**8
