"""Process: a process that was started from here ends with this one, killed or not."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1
#: Looked up before any fork: that takes the loader's lock, which another thread may hold when a process is forked.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """Have the kernel of Linux end this process when its parent is gone. One call and no lock: safe after a fork."""
    assert _prctl is not None
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


#: For `preexec_fn` of subprocess: the only way to end with a parent that is killed. None where only Linux has one.
end_with_parent = _end_with_parent if sys.platform == "linux" else None
