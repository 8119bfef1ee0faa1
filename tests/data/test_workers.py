"""Parts come back in order. One that never ends, fills the memory or crashes is examined; nothing keeps running."""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atomtune.data import workers
from atomtune.data.workers import in_order
from atomtune.errors import BadData, RunFailed

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


def test_closing_the_iterator_early_ends_the_workers():
    parts = in_order(computed, range(4, 8), workers=2, examine=refuse_none)
    assert next(parts) == 4
    parts.close()
    assert not multiprocessing.active_children()
