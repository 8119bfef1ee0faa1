"""Limits: runs untrusted programs first in another process, with limits of time and memory.

Chat templates, and the regexes of tokenizers and adapters, are such programs: a dozen characters can compute for years
or allocate a terabyte. Nothing can stop them within this process, least of all code in Rust, but another process can be
killed. It is forked, so its input need not be sent, and it reports only which part of its work it has reached.

On systems where a process cannot be forked safely (macOS, Windows), nothing is tried.
"""

import faulthandler
import os
import re
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atomtune.process import STOP_SIGNALS

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

#: Seconds of processor time, seconds by the clock (for a busy machine), and bytes of additional memory.
SECONDS, CLOCK_SECONDS, MORE_BYTES = 5, 60, 2 * 10**9
_DONE = "\0done"
Cause = Literal["time", "memory", "crash"]


@dataclass(frozen=True)
class Tripped:
    """How a trial ended that did not finish."""

    cause: Cause
    at: str  # the place that it reported last
    seconds: int = SECONDS  # the limit of processor time

    @property
    def words(self) -> str:
        return {
            "time": f"did not finish within {self.seconds:,} seconds",
            "memory": f"asked for more than {MORE_BYTES / 10**9:.0f} GB of memory",
            "crash": "crashed the process that tried it",
        }[self.cause]


def try_in_child_process(
    work: Callable[[Callable[[str], None]], object], *, seconds: int = SECONDS, each_place: bool = False
) -> Tripped | None:
    """Run `work` in a process with limits; None if it finished, even with an exception.

    work        is called with a function that reports its place; its result or exception is discarded
    seconds     limit of processor time
    each_place  start both limits of time anew at each place
    """
    if sys.platform != "linux":
        return None
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python warns that a forked process may wait for locks of other threads; this one uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reader)
        _be_tried(work, writer, seconds, each_place=each_place)  # never returns
    os.close(writer)
    try:
        output = _listen(reader, each_place=each_place)
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
    if output.endswith(_DONE):
        return None
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and used.ru_utime < seconds / 2:
        return None  # it hardly computed: it waited for a thread's lock, or for the processor
    at = output.rpartition("\0")[2]
    if output.endswith("\0memory"):
        return Tripped("memory", output.removesuffix("\0memory").rpartition("\0")[2], seconds)
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    cause: Cause = "time" if ended_by in (signal.SIGXCPU, signal.SIGKILL) else "crash"
    return Tripped("memory" if ended_by == signal.SIGABRT else cause, at, seconds)


def _be_tried(work: Callable[[Callable[[str], None]], object], writer: int, seconds: int, *, each_place: bool) -> None:
    """In the child process: set the limits, work, and exit without Python's cleanup."""

    def say(place: str) -> None:
        os.write(writer, f"\0{place}".encode("utf-8", "backslashreplace"))
        if each_place:
            _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + seconds)

    try:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _silence()
        # tokenizers' threads are not forked, and it would wait for them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _limit(resource.RLIMIT_CPU, seconds)
        _limit(resource.RLIMIT_CORE, 0)
        limit_memory(MORE_BYTES)
        work(say)
    except MemoryError:
        say("memory")
    except BaseException:  # noqa: BLE001  # the real work, later, raises it again where it is handled
        say("done")
    else:
        say("done")
    finally:
        os._exit(0)


def _listen(reader: int, *, each_place: bool) -> str:
    """All reports of the child process, until it is done, ends, or exceeds the time by the clock."""
    output = b""
    until = time.monotonic() + CLOCK_SECONDS
    while (left := until - time.monotonic()) > 0:
        ready, _, _ = select.select([reader], [], [], left)
        if not ready:
            break
        part = os.read(reader, 2**16)
        if not part:
            break
        output += part
        if each_place:
            until = time.monotonic() + CLOCK_SECONDS
        if output.endswith(_DONE.encode()):
            break
    return output.decode("utf-8", "replace")


def _silence() -> None:
    """Discard the child's output: Rust's panics and Python's tracebacks. The parent reports the failure instead."""
    faulthandler.disable()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def limit_memory(more_bytes: int) -> None:
    """Limit this process to this much additional memory; an allocation beyond that raises MemoryError."""
    try:
        addresses = _address_space()
    except OSError:  # without /proc the present use is unknown, and any limit might be too low
        return
    _limit(resource.RLIMIT_AS, addresses + more_bytes)


def most_memory_held() -> int | None:
    """Peak memory of this process in bytes; None on Windows."""
    if resource is None:
        return None
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:  # getrusage's peak begins with that of the parent process
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _address_space() -> int:
    """Bytes of virtual addresses in use, most of which are not backed by memory."""
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
