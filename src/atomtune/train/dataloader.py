"""Workers: the processes that collate batches ahead, which leave a stop to the run.

Before: the Trainer's DataLoader.  After: trainer.py.
A terminal or a cluster's scheduler signals every process of a job. torch lets SIGTERM end a worker, and a worker's end
is an error of the run; so workers begin, and stay, with these signals blocked.
"""

import multiprocessing
import signal
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

from atomtune.train.callbacks import SIGNALS


class _Deaf(ForkProcess):
    """A process that no signal to the job reaches; it ends with its work or with its parent, as torch's workers do."""

    def start(self) -> None:
        # Blocked before the fork: a handler set in the worker would come too late for a signal that comes at once.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self) -> None:
        self.kill()


class _Fork(ForkContext):
    Process = _Deaf  # the library asks the context for it


def deaf_workers(loader: Any) -> Any:
    """The DataLoader, its workers deaf; as it is where it has none, or where they are not forked."""
    inner = getattr(loader, "base_dataloader", loader)  # inside accelerate's
    if inner.num_workers and inner.multiprocessing_context is None and multiprocessing.get_start_method() == "fork":
        inner.multiprocessing_context = _Fork()
    return loader
