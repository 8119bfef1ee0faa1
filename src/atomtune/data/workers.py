"""Workers: parts of a file encoded by several processes, in order and in bounded memory.

A part is parsed, rendered and tokenized where it is sent to; what comes back is a finished table. Small files are
encoded in this process: a pool costs more than it saves there.
"""

import gc
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

Part = TypeVar("Part")
Made = TypeVar("Made")

#: Parts that wait for a process or for their turn, per process: enough to keep it busy, few enough to forget.
_AHEAD = 3
#: The work of this pool's processes; they are forked, so it need not be sent (a tokenizer may come with its own code).
_work: Callable[[Any], Any] | None = None


def workers_here() -> int:
    """How many processes encode: one per core this process may use; one where processes cannot be forked safely."""
    if sys.platform != "linux":
        return 1
    return len(os.sched_getaffinity(0))


def in_order(work: Callable[[Part], Made], parts: Iterable[Part], *, workers: int) -> Iterator[Made]:
    """map(work, parts) over several processes."""
    if workers <= 1:
        yield from map(work, parts)
        return
    global _work  # noqa: PLW0603  # how a forked process finds its work
    _work = work
    # The tokenizer's own threads do not survive a fork, and the processes are as many as the cores.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    executor = ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_begin)
    waiting: deque[Future[Made]] = deque()
    try:
        for part in parts:
            waiting.append(executor.submit(_do, part))
            if len(waiting) >= workers * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        _work = None
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _begin() -> None:
    """In a new process: the parent alone answers signals, and its end is this one's.

    What is made of records has no cycles; looking for some took a tenth of the time.
    """
    gc.disable()
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
