"""Workers: a process pool that encodes the parts of a file in order and in bounded memory.

A worker parses, renders and tokenizes a part and returns a finished table. The chat template and the tokenizer's
patterns may be untrusted programs that never end or take all memory. A part that takes too long, or whose worker dies,
is examined in a process with limits (limits.py), so that the error can name the record.
"""

import gc
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import parent_process
from typing import Any, TypeVar

from atomtune.container import cores
from atomtune.errors import RunFailed
from atomtune.limits import limit_memory
from atomtune.process import STOP_SIGNALS

Part = TypeVar("Part")
Made = TypeVar("Made")

#: Parts in flight per process, waiting to be encoded or yielded: enough to keep it busy without much memory.
_AHEAD = 3
#: A part usually takes one second; after this long it is examined.
PATIENCE_SECONDS = 10.0
#: Memory a worker may allocate on top of what it starts with; the longest allowed record takes half of it.
MORE_BYTES = 2**32
#: The function that this worker process runs; None in the parent.
_work: Callable[[Any], Any] | None = None


def workers_here() -> int:
    """The number of worker processes: one per core that this may use; 0 outside Linux, where a fork is not safe."""
    if sys.platform != "linux":
        return 0
    return cores()


def in_order(
    work: Callable[[Part], Made], parts: Iterable[Part], *, workers: int, examine: Callable[[Part], None]
) -> Iterator[Made]:
    """map(work, parts) over several processes; with 0 workers, in this process.

    examine  called with a part that takes too long or may have killed its worker; raises an error that names the
             record in it that never ends, fills the memory or kills the process
    Raises RunFailed if a worker dies or runs out of memory and no part is found to be the cause.
    """
    if not workers:
        yield from map(work, parts)
        return
    context = _context()
    # Workers are forked, so `work` is not pickled: a tokenizer with its own code could not be.
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(work,))
    waiting: deque[tuple[Part, Future[Made]]] = deque()
    try:
        for part in parts:
            waiting.append((part, executor.submit(_do, part)))
            if len(waiting) >= workers * _AHEAD:
                yield _first(waiting, examine)
        while waiting:
            yield _first(waiting, examine)
    except (BrokenProcessPool, MemoryError) as error:
        for part, _ in waiting:  # one death breaks the whole pool: the cause may be any part in flight
            examine(part)
        raise RunFailed(
            "A process that encodes records was killed or ran out of memory: this machine's memory may be full.\n"
            "Free some memory and run the command again."
        ) from error
    finally:
        if waiting:  # their results are not needed any more, and may never come
            for process in context.processes:
                process.kill()
        executor.shutdown(wait=True, cancel_futures=True)


def _context() -> Any:
    """A fork context that keeps its processes in `processes`.

    The workers ignore SIGTERM, so the pool cannot terminate them; the caller kills them through this list.
    """
    from multiprocessing.context import ForkContext, ForkProcess  # do not exist on Windows

    class Context(ForkContext):
        def __init__(self) -> None:
            super().__init__()
            self.processes: list[ForkProcess] = []

        def Process(self, *args: Any, **options: Any) -> ForkProcess:  # type: ignore[override]  # their name
            self.processes.append(ForkProcess(*args, **options))
            return self.processes[-1]

    return Context()


def _first(waiting: deque[tuple[Part, Future[Made]]], examine: Callable[[Part], None]) -> Made:
    """The result of the oldest part. While it is late, the part is examined, each time after twice the wait."""
    part, future = waiting[0]
    patience = PATIENCE_SECONDS
    while not wait_for([future], timeout=patience).done:
        examine(part)
        patience *= 2
    made = future.result()
    waiting.popleft()
    return made


def _begin(work: Callable[[Any], Any]) -> None:
    """Set up a worker: it leaves signals to the parent and ends when the parent ends."""
    global _work  # noqa: PLW0603  # one per worker process
    _work = work
    gc.disable()  # encoding creates no reference cycles, and searching for them took a tenth of the time
    # The tokenizer's own threads do not survive a fork, and there is already one process per core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    limit_memory(MORE_BYTES)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(part: Any) -> Any:
    assert _work is not None
    return _work(part)
