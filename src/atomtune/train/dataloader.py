"""Dataloader: the processes that collate batches ahead leave a signal to the run.

A terminal or a cluster's scheduler signals every process of a job. torch lets SIGTERM end a worker, and a worker's end
is an error of the run; so workers begin, and stay, with these signals blocked.

A worker hands its batches over in a thread. An error there was printed and the batch was missing: the run waited for it
for ever. So it ends the worker, which ends the run.
"""

import errno
import multiprocessing
import os
import signal
import traceback
from typing import Any

from atomtune.disk import no_shared_memory, sharing_problem
from atomtune.train.callbacks import SIGNALS

#: What a worker ends with that found no shared memory for its batch.
_NOT_SHARED = errno.ENOSPC
#: The workers that were started last, or still run: torch says which ended, and not by what.
_started: list[Any] = []


def lost_worker(error: BaseException, *, workers: int) -> str:
    """Why other processes could not be started or ended, and the way without workers; "" for any other error."""
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
        """A process that no signal to the job reaches; it ends with its work or with its parent, as torch's do."""

        def start(self) -> None:
            # Blocked before the fork: worker_init_fn runs too late for a signal that comes at once.
            _started[:] = [*(worker for worker in _started if worker.is_alive()), self]
            mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)

        def run(self) -> None:
            # In this process alone. There is no public way; it was made for concurrent.futures, which replaces it so.
            Queue._on_queue_feeder_error = staticmethod(end_worker)  # type: ignore[attr-defined]
            super().run()

        def terminate(self) -> None:
            self.kill()

    class SignalMaskedContext(ForkContext):
        Process = SignalMaskedProcess  # torch asks the context for the class of its workers

    return SignalMaskedContext()


def with_signal_masked_workers(loader: Any) -> Any:
    """The same DataLoader; its workers, where it forks any, do not hear a signal to the job."""
    inner = getattr(loader, "base_dataloader", loader)  # inside accelerate's
    if inner.num_workers and inner.multiprocessing_context is None and multiprocessing.get_start_method() == "fork":
        inner.multiprocessing_context = _signal_masked_context()
    return loader
