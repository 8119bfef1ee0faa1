"""Dataloader: the processes that collate batches ahead leave a signal to the run.

A terminal or a cluster's scheduler signals every process of a job. torch lets SIGTERM end a worker, and a worker's end
is an error of the run; so workers begin, and stay, with these signals blocked.
"""

import multiprocessing
import signal
from typing import Any

from atomtune.train.callbacks import SIGNALS


def _signal_masked_context() -> Any:
    from multiprocessing.context import ForkContext, ForkProcess  # Windows has neither

    class SignalMaskedProcess(ForkProcess):
        """A process that no signal to the job reaches; it ends with its work or with its parent, as torch's do."""

        def start(self) -> None:
            # Blocked before the fork: worker_init_fn runs too late for a signal that comes at once.
            mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)

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
