# PYTHON_ARGCOMPLETE_OK
"""The command `atomtune`, and `python -m atomtune`: a stop signal is answered from the first moment on."""

import contextlib
import os
import signal
import sys
from types import FrameType

from atomtune.errors import ExitCode
from atomtune.process import STOP_SIGNALS


def main() -> int:
    """Run the command line. The import of its module takes long enough for a Ctrl-C to come meanwhile."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _end_at_once)
    from atomtune.cli import main as run

    return run()


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """End the process: nothing has begun yet. An exception would become an ImportError in some imports."""
    with contextlib.suppress(OSError):
        os.write(2, b"\natomtune: stopped by a signal.\n")
    os._exit(ExitCode.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
