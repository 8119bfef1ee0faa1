"""Server process: an engine that runs beside this program and always ends with it."""

import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

import psutil

from atomtune.engines.engine import EngineBroke, direct
from atomtune.errors import RunFailed
from atomtune.process import end_with_parent

#: Most seconds for an engine to load its model.
STARTS_WITHIN = 600
#: Most seconds for it to end before it is killed.
ENDS_WITHIN = 10
#: How many lines of its output are shown if it fails.
SHOWN_LINES = 12
#: The last line of a Python traceback, possibly after a logger's prefix.
_ERROR = re.compile(r"(?:^|[\])] )[\w.]+(?:Error|Exception): ")
#: The variables that hold an engine's API key. They are not inherited, so a server gets a key only if one is passed.
KEY_VARIABLES = ("ATOMTUNE_API_KEY", "VLLM_API_KEY")
_STANDARD_ERROR = 2


class ServerProcess:
    """A process in its own process group; leaving the `with` block ends the whole group.

    command       words of the command line
    health        URL that answers when the engine is ready
    folder        working directory
    environment   variables to add to this program's, whose API keys are left out
    shows         whether its output goes to the terminal; otherwise its last lines are shown if it fails
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        health: str,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        starts_within: float = STARTS_WITHIN,
        shows: bool = False,
    ) -> None:
        self.command, self.health, self.starts_within = list(command), health, starts_within
        self.folder, self.shows = folder, shows
        inherited = {name: value for name, value in os.environ.items() if name not in KEY_VARIABLES}
        self.environment = {**inherited, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ServerProcess":
        self.output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # closed by end
        try:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=_STANDARD_ERROR if self.shows else self.output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.folder,
                start_new_session=os.name == "posix",
                preexec_fn=end_with_parent,  # noqa: PLW1509  # safe after a fork: see process.py
            )
            self._wait_until_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, _kind: object = None, error: BaseException | None = None, _trace: object = None) -> None:
        broke = isinstance(error, EngineBroke) and not self.shows
        lines = self.last_lines() if broke else ""
        self.end()
        if broke:
            raise RunFailed(f"{error}\nIts last lines:\n{lines}") from None

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.starts_within
        while time.monotonic() < deadline:
            self._refuse_replaced()
            self.refuse_ended()
            with contextlib.suppress(OSError, HTTPException), direct.open(self.health, timeout=5):
                if self._listens():
                    return
            time.sleep(0.2)
        raise RunFailed(f"The engine did not answer within {self.starts_within:g} seconds.\n{self.last_lines()}")

    def _listens(self) -> bool:
        """Whether a process of this engine listens on the port; True if the system does not tell."""
        assert self.process is not None
        port = urllib.parse.urlsplit(self.health).port
        try:
            engine = psutil.Process(self.process.pid)
            for process in (engine, *engine.children(recursive=True)):
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                        return True
        except psutil.NoSuchProcess:
            return False
        except (psutil.Error, OSError):
            return True
        return False

    def _refuse_replaced(self) -> None:
        """Raise RunFailed if this engine has ended and another program listens on its port."""
        assert self.process is not None
        address = urllib.parse.urlsplit(self.health)
        if self.process.poll() is not None:
            with contextlib.suppress(OSError), socket.create_connection((address.hostname, address.port), timeout=5):
                raise RunFailed(
                    f"The engine ended, and another program listens on port {address.port}: it took the port while the "
                    "engine was starting. Run the command again, or pass another --port."
                )

    def refuse_ended(self) -> None:
        """Raise RunFailed with the engine's last lines if its process has ended."""
        assert self.process is not None
        code = self.process.poll()
        if code is not None:
            raise RunFailed(f"The engine ended with exit code {code}. Its last lines:\n{self.last_lines()}")

    def last_lines(self) -> str:
        """The end of the output and, before it, the first earlier error: if one process fails, others fail after it."""
        self.output.seek(0)
        lines = self.output.readlines()
        earlier, last = lines[:-SHOWN_LINES], lines[-SHOWN_LINES:]
        cause = next((line for line in earlier if _ERROR.search(line)), None)
        shown = last if cause is None else [cause, "…", *last]
        return "\n".join(f"  {line.rstrip()}" for line in shown)

    def wait(self) -> None:
        """Wait until the engine ends. Raises RunFailed, because it should not end by itself."""
        assert self.process is not None
        self.process.wait()
        self.refuse_ended()

    def end(self) -> None:
        """Terminate the whole group, and kill what has not ended in time."""
        process = self.process
        if process is not None:
            _signal_group(process, signal.SIGTERM)
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(ENDS_WITHIN)
            finally:  # a second Ctrl-C during that wait must not leave the engine running
                _signal_group(process, getattr(signal, "SIGKILL", signal.SIGTERM))
                process.wait()
        self.output.close()
        self.process = None


def _signal_group(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(process.pid, number)
        else:
            process.terminate()


def address_problems(host: str, port: int) -> list[str]:
    """Why no server can listen at this address; empty if one can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do, so that one that just ended is no obstacle
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return [f"--port {port}: another program is listening there. Pass another port."]
            return [f"--host {host} --port {port}: cannot listen there: {error.strerror}. Use another host or port."]
        except UnicodeError:  # a host name with an empty or too long part
            return [f"--host {host}: expected an address of this machine, for example 127.0.0.1."]
    return []


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
