"""Workers: parts of a file encoded by several processes, in order and in bounded memory.

A part is parsed, rendered and tokenized where it is sent to; what comes back is a finished table. What is rendered and
tokenized may be a stranger's program, which a process can be ended for: it is named by the record it does not end on.
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

from atomtune.errors import RunFailed
from atomtune.limits import limit_memory

Part = TypeVar("Part")
Made = TypeVar("Made")

#: Parts that wait for a process or for their turn, per process: enough to keep it busy, and little memory.
_AHEAD = 3
#: A part takes a second; one that is waited for longer is examined.
PATIENCE_SECONDS = 10.0
#: What a process may take beside what it begins with; the longest record that is read takes half of it.
MORE_BYTES = 2**32
#: In a process of a pool: its work.
_work: Callable[[Any], Any] | None = None


def workers_here() -> int:
    """How many processes encode: one per core this process may use; none where they cannot be forked safely."""
    if sys.platform != "linux":
        return 0
    return len(os.sched_getaffinity(0))


def in_order(
    work: Callable[[Part], Made], parts: Iterable[Part], *, workers: int, examine: Callable[[Part], None]
) -> Iterator[Made]:
    """map(work, parts) over several processes; with no workers, in this one.

    examine  raises an error that names what in a part never ends, fills the memory or ends its process; asked of parts
             that are waited for in vain
    """
    if not workers:
        yield from map(work, parts)
        return
    context = _context()
    # The processes are forked, so the work need not be sent: a tokenizer may come with its own code.
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
        for part, _ in waiting:  # the processes end together: the cause may be any part that had begun
            examine(part)
        raise RunFailed(
            "A process that encodes records was killed or ran out of memory: this machine's memory may be full.\n"
            "Free some memory and run the command again."
        ) from error
    finally:
        if waiting:  # nobody wants what they still do, and it may never end
            for process in context.processes:
                process.kill()
        executor.shutdown(wait=True, cancel_futures=True)


def _context() -> Any:
    """How a pool starts its processes, which are kept here: they ignore the signal by which the pool would end them."""
    from multiprocessing.context import ForkContext, ForkProcess  # Windows has neither

    class Context(ForkContext):
        def __init__(self) -> None:
            super().__init__()
            self.processes: list[ForkProcess] = []

        def Process(self, *args: Any, **options: Any) -> ForkProcess:  # type: ignore[override]  # its name there
            self.processes.append(ForkProcess(*args, **options))
            return self.processes[-1]

    return Context()


def _first(waiting: deque[tuple[Part, Future[Made]]], examine: Callable[[Part], None]) -> Made:
    """What the part became that waits longest; one that is waited for in vain is examined."""
    part, future = waiting[0]
    patience = PATIENCE_SECONDS
    while not wait_for([future], timeout=patience).done:
        examine(part)
        patience *= 2
    made = future.result()
    waiting.popleft()
    return made


def _begin(work: Callable[[Any], Any]) -> None:
    """In a new process: the parent alone answers signals, and its end is this one's.

    What is made of records has no cycles; looking for some took a tenth of the time.
    """
    global _work  # noqa: PLW0603  # of this process, which has one work
    _work = work
    gc.disable()
    # The tokenizer's own threads do not survive a fork, and the processes are as many as the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    limit_memory(MORE_BYTES)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
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
