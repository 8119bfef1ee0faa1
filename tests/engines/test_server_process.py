"""Law: an engine's process ends with the process that started it, whatever happens."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from atomtune.engines.engine import UnknownTokens, post
from atomtune.engines.server_process import ServerProcess, address_problems, free_port
from atomtune.errors import RunFailed

#: A server that answers, with a child process.
SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""
#: A server that fails at a request and gives the reason only in its output.
FAILING = SERVER.replace(
    "http.server.HTTPServer",
    """
    def do_POST(self):
        print("ValueError: attention needs BF16", flush=True)
        self.send_response(500); self.end_headers(); self.wfile.write(b"see the stack trace above")
http.server.HTTPServer""",
)
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVER


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def gone(pid: int, within: float = 20) -> bool:
    deadline = time.monotonic() + within
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not alive(pid)


def server(source: str = SERVER, **more: float) -> ServerProcess:
    port = free_port()
    return ServerProcess([sys.executable, "-c", source, str(port)], health=f"http://127.0.0.1:{port}/", **more)


def pids_of(running: ServerProcess) -> tuple[int, int]:
    """Process ids of the server and its child."""
    child = int(running.last_lines().split("child ")[1].split()[0])
    return running.process.pid, child


def test_the_whole_process_group_is_ended_when_the_block_exits():
    with server() as running:
        pids = pids_of(running)
        assert all(map(alive, pids))
    assert all(map(gone, pids))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_whole_process_group_is_ended_after_an_error(error):
    with pytest.raises(error), server() as running:
        pids = pids_of(running)
        raise error
    assert all(map(gone, pids))


def test_an_engine_that_fails_at_a_request_shows_its_last_lines():
    """Its answer refers to a stack trace in its output, which the user could not see."""
    with pytest.raises(RunFailed, match=r"500 at .*see the stack trace above") as told, server(FAILING) as running:
        post(running.health, {})
    assert "ValueError: attention needs BF16" in str(told.value)


@pytest.mark.parametrize("said", ["Prompt contains invalid tokens", "Token id 49152 is out of vocabulary"])
def test_unknown_token_ids_are_reported_as_a_model_of_another_base(said):
    """With llama.cpp's and vLLM's messages: the served model was made from another base, so the check fails."""
    refusing = FAILING.replace("send_response(500)", "send_response(400)").replace("see the stack trace above", said)
    with pytest.raises(UnknownTokens, match="made of another base"), server(refusing) as running:
        post(running.health, {})


def test_the_http_proxy_is_not_used_for_the_local_engine(monkeypatch):
    """With http_proxy set, as in many offices, no engine ever became ready."""
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    with server(starts_within=20) as running, pytest.raises(RunFailed, match="501"):  # the server does not support POST
        post(running.health, {})


def test_an_engine_that_ignores_the_termination_signal_is_killed(monkeypatch):
    monkeypatch.setattr("atomtune.engines.server_process.ENDS_WITHIN", 0.5)
    with server(STUBBORN) as running:
        pids = pids_of(running)
    assert all(map(gone, pids))


@pytest.mark.skipif(os.name != "posix", reason="a timer's signal stands for the second Ctrl-C")
def test_a_second_ctrl_c_during_shutdown_kills_the_engine_at_once():
    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    pids: tuple[int, ...] = ()
    try:
        with pytest.raises(KeyboardInterrupt), server(STUBBORN) as running:
            pids = pids_of(running)
            signal.setitimer(signal.ITIMER_REAL, 0.5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert pids and all(gone(pid, within=2) for pid in pids)


def test_a_failed_start_is_reported_with_the_engines_last_output():
    failing = server("import sys; print('no such model'); sys.exit(3)")
    with pytest.raises(RunFailed, match=r"exit code 3(.|\n)*no such model"), failing:
        pass


def test_an_engine_workers_error_is_shown_even_if_many_lines_follow():
    source = """
import sys
print("(Server) WARNING [start.py:1] limits can cause errors like `OSError: too many files`")
print("(Worker pid=7) ERROR 11:02 [load.py:9] ValueError: no weight of that name")
for line in range(40):
    print("at", line)
sys.exit(1)
"""
    failing = server(source)
    with pytest.raises(RunFailed, match="ValueError: no weight of that name") as error, failing:
        pass
    assert "OSError" not in str(error.value) and "at 39" in str(error.value) and "at 9\n" not in str(error.value)


def test_an_engine_that_never_answers_is_ended_at_the_timeout():
    port = free_port()
    words = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = ServerProcess(words, health=f"http://127.0.0.1:{port}/", starts_within=1)
    with pytest.raises(RunFailed, match="did not answer within 1 seconds"):
        process.__enter__()
    assert process.process is None


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends a killed parent's children on Linux only")
def test_another_program_on_the_port_is_not_taken_for_the_engine():
    """Two servers were started on one port. Both were reported as ready, although one of them had ended."""
    with server() as first:
        port = first.health.rpartition(":")[2].strip("/")
        second = ServerProcess([sys.executable, "-c", "import time; time.sleep(0.5)"], health=first.health)
        with pytest.raises(RunFailed, match=f"another program listens on port {port}"), second:
            pass
        assert alive(first.process.pid)


def test_the_engine_ends_when_its_parent_is_killed():
    program = (
        "import sys, time\nfrom tests.engines.test_server_process import server, pids_of\n"
        "running = server().__enter__()\nprint(pids_of(running)[0], flush=True)\ntime.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, encoding="utf-8")
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(pid)


def test_an_address_that_cannot_be_bound_is_reported():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert address_problems("127.0.0.1", port) == [
            f"--port {port}: another program is listening there. Pass another port."
        ]
    assert address_problems("127.0.0.1", port) == []
    for host in ("a..b", "a" * 70, "192.0.2.1"):  # no name, a name that is too long, the address of another machine
        (said,) = address_problems(host, port)
        assert host in said


@pytest.mark.parametrize("answer", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", b""])
def test_a_malformed_or_truncated_engine_response_is_reported(answer):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            connection.recv(2**16)
            connection.sendall(answer)
            connection.close()

        server = threading.Thread(target=serve)
        server.start()
        with pytest.raises(RunFailed, match="does not answer"):
            post(f"http://127.0.0.1:{listening.getsockname()[1]}", {})
        server.join()
