"""The limits of a container: memory and processor time, from the files of control groups of versions 1 and 2."""

import pytest

from atomtune import container
from atomtune.container import cores, memory_left, memory_limit

GB = 10**9


@pytest.fixture
def system(tmp_path, monkeypatch):
    """system(groups, files) lays /proc/self/cgroup and files of /sys/fs/cgroup elsewhere; 8 cores are visible."""

    def lay(groups: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(groups, encoding="utf-8")
        for name, text in files.items():
            path = tmp_path / "sys" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    monkeypatch.setattr(container, "_ROOT", tmp_path / "sys")
    monkeypatch.setattr(container, "_OF_THIS_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(container, "visible_cores", lambda: 8)
    return lay


def memory_of_version_2(group: str, *, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    return {
        f"{group}memory.max": f"{limit}\n",
        f"{group}memory.current": f"{used}\n",
        f"{group}memory.stat": f"anon {used - cached}\nactive_file {cached}\ninactive_file 0\n",
    }


def test_a_container_that_sees_its_own_group_as_the_root_has_its_limits(system):
    # Docker, Kubernetes
    files = {**memory_of_version_2("", limit=str(4 * GB), used=3 * GB, cached=GB), "cpu.max": "250000 100000\n"}
    system("0::/\n", files)
    assert (memory_limit(), memory_left(), cores()) == (4 * GB, 2 * GB, 3)


def test_the_tightest_limit_of_all_groups_around_a_process_applies(system):
    # SLURM: a job within a user's share of the machine; here the outer group is the tighter one for memory
    files = {
        **memory_of_version_2("user/任务/", limit=str(16 * GB), used=GB),
        **memory_of_version_2("user/", limit=str(10 * GB), used=9 * GB),
        "user/任务/cpu.max": "400000 100000\n",
        "user/cpu.max": "max 100000\n",
    }
    system("0::/user/任务\n", files)
    assert (memory_limit(), memory_left(), cores()) == (10 * GB, GB, 4)


def test_version_1_has_a_tree_of_groups_for_memory_and_another_for_the_processor(system):
    files = {
        "memory/job/memory.limit_in_bytes": f"{2 * GB}\n",
        "memory/job/memory.usage_in_bytes": f"{GB}\n",
        "memory/job/memory.stat": f"active_file 5\ntotal_active_file {GB // 4}\ntotal_inactive_file {GB // 4}\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": f"{30 * GB}\n",
        "cpu/cpu.cfs_quota_us": "50000\n",
        "cpu/cpu.cfs_period_us": "100000\n",
    }
    # The path of the processor's group is one of the machine, which this container does not see.
    system("9:cpu,cpuacct:/docker/0123\n4:memory:/job\n0::/\n", files)
    assert (memory_limit(), memory_left(), cores()) == (2 * GB, 3 * GB // 2, 1)


def test_without_limits_the_whole_machine_may_be_used(system):
    no_limit = memory_of_version_2("job/", limit="max", used=GB)
    of_version_1 = {"memory/memory.limit_in_bytes": "9223372036854771712\n", "cpu/cpu.cfs_quota_us": "-1\n"}
    system("9:cpu:/\n4:memory:/\n0::/job\n", {**no_limit, **of_version_1, "cpu/cpu.cfs_period_us": "100000\n"})
    assert (memory_limit(), memory_left(), cores()) == (None, None, 8)


def test_a_system_without_control_groups_has_no_limits(system):
    system("", {})
    assert (memory_limit(), memory_left(), cores()) == (None, None, 8)


def test_a_share_above_the_visible_cores_does_not_add_cores(system):
    system("0::/\n", {"cpu.max": "6400000 100000\n"})
    assert cores() == 8
