"""Limits: a stranger's program is run first in a process of its own that may not take long, nor much memory.

Chat templates and the regexes of tokenizers and adapters are such programs: a dozen characters of one can compute for
years or ask for a terabyte. Nothing inside this process can stop them, least of all what runs in Rust; another process
can be ended. It is forked, so what it works on need not be sent, and what it says is only where it was.

Where processes cannot be forked safely (macOS, Windows), nothing is tried beforehand.
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

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

#: Of the processor, and by the clock where the processor is shared; and what may be taken beside what there is.
SECONDS, CLOCK_SECONDS, MORE_BYTES = 5, 60, 2 * 10**9
_DONE = "\0done"
Cause = Literal["time", "memory", "crash"]


@dataclass(frozen=True)
class Tripped:
    """How a trial ended that did not come to its end."""

    cause: Cause
    at: str  # what it was at, as it said
    seconds: int = SECONDS  # what it had

    @property
    def words(self) -> str:
        return {
            "time": f"did not finish within {self.seconds:,} seconds",
            "memory": f"asked for more than {MORE_BYTES / 10**9:.0f} GB of memory",
            "crash": "crashed the process that tried it",
        }[self.cause]


def try_apart(
    work: Callable[[Callable[[str], None]], object], *, seconds: int = SECONDS, each_place: bool = False
) -> Tripped | None:
    """Do the work in a process with limits; None where it ended, by itself or by an exception.

    work        is handed a function to say where it is; what it returns or raises stays in that process
    seconds     of the processor
    each_place  the seconds, and those by the clock, begin anew at each place
    """
    if sys.platform != "linux":
        return None
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python warns of threads whose locks a forked process may find closed: it uses none of theirs.
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
        return None  # it waited and did not compute: for a lock that a thread held when it was forked, or for its turn
    at = output.rpartition("\0")[2]
    if output.endswith("\0memory"):
        return Tripped("memory", output.removesuffix("\0memory").rpartition("\0")[2], seconds)
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    cause: Cause = "time" if ended_by in (signal.SIGXCPU, signal.SIGKILL) else "crash"
    return Tripped("memory" if ended_by == signal.SIGABRT else cause, at, seconds)


def _be_tried(work: Callable[[Callable[[str], None]], object], writer: int, seconds: int, *, each_place: bool) -> None:
    """In the new process: take the limits, work, and end without whatever a process does in its end."""

    def say(place: str) -> None:
        os.write(writer, f"\0{place}".encode("utf-8", "backslashreplace"))
        if each_place:
            _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + seconds)

    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        _silence()
        # The threads that tokenizers computes with are not forked, and it would wait for them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _limit(resource.RLIMIT_CPU, seconds)
        _limit(resource.RLIMIT_CORE, 0)
        limit_memory(MORE_BYTES)
        work(say)
    except MemoryError:
        say("memory")
    except BaseException:  # noqa: BLE001  # what it raises here it raises again where somebody answers it
        say("done")
    else:
        say("done")
    finally:
        os._exit(0)


def _listen(reader: int, *, each_place: bool) -> str:
    """All that the process said, until it is done, ends or takes too long by the clock."""
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
    """Rust writes where it panicked, and Python where it was; the same is said in plain words later."""
    faulthandler.disable()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def limit_memory(more_bytes: int) -> None:
    """From now on this process gets so much more memory, and then a MemoryError."""
    try:
        addresses = _address_space()
    except OSError:  # without /proc nobody knows what it has: any limit might be too low to go on
        return
    _limit(resource.RLIMIT_AS, addresses + more_bytes)


def most_memory_held() -> int | None:
    """The most bytes that this process has held so far; None on Windows."""
    if resource is None:
        return None
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:  # getrusage's figure starts with that of the process that started this one
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _address_space() -> int:
    """Bytes of addresses in use, most of which no memory stands behind."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
