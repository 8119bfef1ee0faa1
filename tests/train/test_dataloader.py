"""Workers are forked, and a lost one is reported as such and not as a bug."""

import multiprocessing
import sys

import pytest
from torch.utils.data import DataLoader

from atomtune.train.dataloader import lost_worker, with_signal_masked_workers


@pytest.fixture
def forkserver_by_default():
    """Python 3.14's default on Linux."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux are workers forked")
def test_workers_are_forked_whatever_python_does_by_default(forkserver_by_default):
    # What is local to a function cannot be sent to a process that is not forked.
    loader = DataLoader([1, 2], num_workers=1, collate_fn=lambda numbers: numbers)
    assert list(with_signal_masked_workers(loader)) == [[1], [2]]


def test_a_killed_dataloader_worker_is_not_reported_as_a_bug():
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "--dataloader_num_workers 0" in lost_worker(killed, workers=2)
    assert lost_worker(RuntimeError("shapes do not fit"), workers=2) == ""
