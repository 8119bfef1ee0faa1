"""Dataloader: worker processes that ignore signals to the job, and that do not fail silently.

A terminal or a cluster's scheduler signals every process of a job. torch lets SIGTERM end a worker, and the end of a
worker is an error of the run. Therefore workers start, and stay, with these signals blocked.

A worker sends its batches from a thread. An error there was only printed, and the run waited forever for the missing
batch. Now it ends the worker, which ends the run.
"""

import errno
import os
import signal
import sys
import traceback
from typing import Any

from atomtune.disk import no_shared_memory, sharing_problem
from atomtune.process import STOP_SIGNALS

#: Exit code of a worker that found no shared memory for its batch.
_NOT_SHARED = errno.ENOSPC
#: Workers started last or still running. torch reports that a worker ended, but not with which exit code.
_started: list[Any] = []


def lost_worker(error: BaseException, *, workers: int) -> str:
    """Why worker processes could not be started or ended, and how to run without them; "" for any other error."""
    problem, text = sharing_problem(error), str(error)
    if text.startswith("DataLoader worker"):
        problem = f"A process that prepares batches was killed, most likely for lack of memory ({text})."
        if any(worker.exitcode == _NOT_SHARED for worker in _started):
            problem = no_shared_memory("there was no room for a batch")
    if problem and workers:
        problem += "\n--dataloader_num_workers 0 prepares batches without other processes."
    return problem


def _signal_masked_context() -> Any:
    from multiprocessing.context import ForkContext, ForkProcess  # Windows has neither
    from multiprocessing.queues import Queue

    def end_worker(error: BaseException, batch: Any) -> None:
        is_known = bool(sharing_problem(error))
        if not is_known:
            traceback.print_exception(error)
        os._exit(_NOT_SHARED if is_known else 1)

    class SignalMaskedProcess(ForkProcess):
        """A process that ignores signals to the job; it ends with its work or with its parent, like torch's workers."""

        def start(self) -> None:
            # Blocked before the fork: a signal could arrive before worker_init_fn runs.
            _started[:] = [*(worker for worker in _started if worker.is_alive()), self]
            mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)

        def run(self) -> None:
            # Replaced in this process only. There is no public way; concurrent.futures replaces this method in the same
            # way.
            Queue._on_queue_feeder_error = staticmethod(end_worker)  # type: ignore[attr-defined]
            super().run()

        def terminate(self) -> None:
            self.kill()

    class SignalMaskedContext(ForkContext):
        Process = SignalMaskedProcess  # torch takes its workers' class from the context

    return SignalMaskedContext()


def with_signal_masked_workers(loader: Any) -> Any:
    """The same DataLoader; on Linux its workers are forked, and ignore signals to the job.

    From Python 3.14 on, workers are not forked by default: each then imports torch anew, at every pass over the data.
    """
    inner = getattr(loader, "base_dataloader", loader)  # inside accelerate's wrapper
    if inner.num_workers and inner.multiprocessing_context is None and sys.platform == "linux":
        inner.multiprocessing_context = _signal_masked_context()
    return loader
