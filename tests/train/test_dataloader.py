"""A lost worker is reported as such and not as a bug, and a run without workers goes on."""

from atomtune.train.dataloader import lost_worker


def test_a_killed_dataloader_worker_is_not_reported_as_a_bug():
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "--dataloader_num_workers 0" in lost_worker(killed, workers=2)
    assert lost_worker(RuntimeError("shapes do not fit"), workers=2) == ""
