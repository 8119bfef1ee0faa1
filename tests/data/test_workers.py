"""Parts come back in order. One that never ends, fills the memory or crashes is examined; nothing keeps running."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atomtune.container import cores
from atomtune.data import workers
from atomtune.data.workers import in_order
from atomtune.errors import BadData, RunFailed
from atomtune.process import STOP_SIGNALS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked safely on Linux only")

BAD_PART = 5


def refuse_bad_part(part: int) -> None:
    if part == BAD_PART:
        raise BadData(f"part {part}")


def refuse_none(part: int) -> None:
    pass


def computed(part: int) -> int:
    if part == BAD_PART:
        while True:
            pass
    return part


def killed(part: int) -> int:
    if part == BAD_PART:
        os.kill(os.getpid(), signal.SIGKILL)
    return part


def slow(part: int) -> int:
    time.sleep(1)
    return part


def slow_or_killed(part: int) -> int:
    return killed(part) if part == BAD_PART else slow(part)


def greedy(part: int) -> int:
    return len(bytearray(2**36)) if part == BAD_PART else part


@pytest.mark.parametrize("count", [0, 1, 2])
def test_in_order_yields_the_same_results_as_map(count):
    assert list(in_order(str, range(10), workers=count, examine=refuse_none)) == [str(part) for part in range(10)]


@pytest.mark.parametrize("work", [computed, killed, greedy])
def test_a_part_that_hangs_or_crashes_its_worker_is_named(monkeypatch, work: Callable[[int], Any]):
    monkeypatch.setattr(workers, "PATIENCE_SECONDS", 0.2)
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(BadData, match="part 5"):
        list(in_order(work, range(8), workers=2, examine=refuse_bad_part))
    assert not multiprocessing.active_children()
    gc.collect()  # the error keeps a reference to the pool
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_worker_killed_from_outside_is_reported_as_killed():
    with pytest.raises(RunFailed, match="was killed"):
        list(in_order(killed, range(8), workers=2, examine=refuse_none))


def test_every_part_in_flight_is_examined_when_a_worker_dies():
    # The first part in flight only waits; the second one is the cause.
    with pytest.raises(BadData, match="part 5"):
        list(in_order(slow_or_killed, [0, BAD_PART], workers=2, examine=refuse_bad_part))


def test_a_late_part_is_examined_less_and_less_often(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE_SECONDS", 0.01)
    examined: list[int] = []
    assert list(in_order(slow, [1], workers=1, examine=examined.append)) == [1]
    assert 1 < len(examined) < 10


def test_only_a_few_parts_are_read_ahead():
    taken: list[int] = []

    def parts():
        for part in range(100):
            taken.append(part)
            yield part

    made = in_order(str, parts(), workers=2, examine=refuse_none)
    assert next(made) == "0"
    assert len(taken) < 10
    made.close()


def test_a_worker_may_take_only_so_much_memory(monkeypatch):
    monkeypatch.setattr(workers, "MORE_BYTES", 2**28)
    with pytest.raises(RunFailed, match="ran out of memory"):
        list(in_order(bytearray, [2**29], workers=1, examine=refuse_none))


def threads_and_collector(_part: int) -> tuple[str | None, bool]:
    return os.environ.get("TOKENIZERS_PARALLELISM"), gc.isenabled()


def test_a_worker_runs_no_threads_of_the_tokenizer_and_no_garbage_collector(monkeypatch):
    # The threads do not survive the fork, and the collector took a tenth of the time.
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    assert list(in_order(threads_and_collector, [0], workers=1, examine=refuse_none)) == [("false", False)]
    assert threads_and_collector(0) == (None, True)


def test_where_a_fork_is_not_safe_there_are_no_workers(monkeypatch):
    assert workers.workers_here() == cores()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert workers.workers_here() == 0


ENDLESS = """
import os, time
from atomtune.data.workers import in_order

def work(part):
    print(os.getpid(), flush=True)
    time.sleep(600)

list(in_order(work, [1], workers=1, examine=print))
"""


def test_a_worker_leaves_signals_to_its_parent_and_ends_with_it():
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        for number in STOP_SIGNALS:
            os.kill(worker, number)
        time.sleep(0.2)
        os.kill(worker, 0)  # it is there
        parent.kill()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker is still there")


def test_closing_the_iterator_early_ends_the_workers():
    parts = in_order(computed, range(4, 8), workers=2, examine=refuse_none)
    assert next(parts) == 4
    parts.close()
    assert not multiprocessing.active_children()
