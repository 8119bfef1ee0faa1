"""Container: the memory and the processor time that the system grants this process, for example in Docker or SLURM.

Linux holds such limits in control groups, each of which is part of a larger one; the tightest limit of them all
applies. psutil and os report the whole machine. Read are the files of version 2
(https://docs.kernel.org/admin-guide/cgroup-v2.html) and of version 1 (…/cgroup-v1/memory.html).
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OF_THIS_PROCESS = Path("/proc/self/cgroup")
#: What version 1 writes for no limit is a little less than 2^63.
_NO_LIMIT = 2**62


@dataclass(frozen=True)
class _MemoryFiles:
    """Names of the files with the limit and the use in bytes, and of cached files' bytes, which can be freed, in
    memory.stat."""

    limit: str
    used: str
    cached: tuple[str, str]


_MEMORY = {
    1: _MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    2: _MemoryFiles("memory.max", "memory.current", ("active_file", "inactive_file")),
}


def memory_limit() -> int | None:
    """Bytes of memory that this process and others in its container may hold together; None without a limit."""
    limits = (_limit(group / _MEMORY[version].limit) for group, version in _groups("memory"))
    return min((limit for limit in limits if limit is not None), default=None)


def memory_left() -> int | None:
    """Bytes of memory that this process may still take within its container; None without a limit."""
    return min((left for group in _groups("memory") if (left := _left(*group)) is not None), default=None)


def cores() -> int:
    """Processor cores that this process may use: those it may run on, or its container's share of them, rounded up."""
    shares = [share for group in _groups("cpu") if (share := _processor_share(*group)) is not None]
    return max(1, min([visible_cores(), *map(math.ceil, shares)]))


def visible_cores() -> int:
    """Processor cores that this process may run on, whatever share of their time it gets."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _groups(controller: str) -> Iterator[tuple[Path, int]]:
    """The folders of the control groups that this process is in, the smallest first, each with its version.

    A container may not see the outer groups, or see its own as the root: a folder that is not there has no limit.
    """
    for line in _text(_OF_THIS_PROCESS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root, version = (_ROOT / controller, 1) if controllers else (_ROOT, 2)
        smallest = root / path.lstrip("/")
        yield from ((group, version) for group in (smallest, *smallest.parents) if group.is_relative_to(root))


def _left(group: Path, version: int) -> int | None:
    names = _MEMORY[version]
    limit, used = _limit(group / names.limit), _number(group / names.used)
    if limit is None or used is None:
        return None
    statistics = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    return max(0, limit - used + sum(int(statistics.get(name, 0)) for name in names.cached))


def _processor_share(group: Path, version: int) -> float | None:
    """Microseconds of processor time in each period, divided by the period; None without a limit."""
    if version == 1:
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    else:
        quota, period = (_whole(word) for word in (_text(group / "cpu.max").split() or ["max", "max"]))
    return quota / period if quota is not None and quota > 0 and period else None


def _limit(path: Path) -> int | None:
    limit = _number(path)
    return None if limit is None or limit >= _NO_LIMIT else limit


def _number(path: Path) -> int | None:
    return _whole(_text(path).strip())


def _whole(text: str) -> int | None:
    """A whole number; None for `max`, which means no limit, and for version 1's -1."""
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    """A file's text; "" if it is missing or may not be read."""
    try:
        return os.fsdecode(path.read_bytes())  # a group's name may hold any bytes
    except OSError:
        return ""
