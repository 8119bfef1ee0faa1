"""Process: the signals that ask a process to stop, and a child process that ends with this one."""

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

#: A launcher sends TERM, a terminal INT or HUP, a cluster's scheduler USR1 before its time limit. Windows has only the
#: first two of these.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
_PR_SET_PDEATHSIG = 1
#: Looked up before any fork, because that needs the loader's lock, which another thread may hold during a fork.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Within this context stop signals wait, and are sent again at its end: a clean-up is not left half done.

    A signal for which Python has no handler, so that the system ends the process, does not wait.
    """
    received: list[int] = []
    handlers_before: dict[int, Any] = {}

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    is_main = threading.current_thread() is threading.main_thread()  # the only thread that handles signals
    try:
        for number in STOP_SIGNALS if is_main else ():
            if callable(signal.getsignal(number)):
                handlers_before[number] = signal.signal(number, receive)
        yield
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


def _end_with_parent() -> None:
    """Make Linux end this process when its parent is gone. It is one call without locks, so it is safe after a fork."""
    assert _prctl is not None
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


#: For `preexec_fn` of subprocess, the only way to end with a parent that is killed. None outside of Linux.
end_with_parent = _end_with_parent if sys.platform == "linux" else None
