"""An unreachable hub is tried once instead of for 46 seconds; a reachable hub is left to the library."""

import os
import socket
import subprocess
import sys

import pytest

from atomtune.hub_reach import reachable


@pytest.fixture
def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_an_open_port_is_reachable_and_a_closed_one_is_not(free_port):
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert reachable(f"http://127.0.0.1:{server.getsockname()[1]}")
    assert not reachable(f"http://127.0.0.1:{free_port}")


def test_behind_a_proxy_nothing_is_tried(free_port, monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert reachable(f"http://localhost:{free_port}/behind-a-proxy")


_LOAD = """
import sys
from atomtune.errors import BadModel
from atomtune.model.load import load_tokenizer
tries = []
sys.addaudithook(lambda event, arguments: tries.append(arguments) if event == "socket.connect" else None)
try:
    load_tokenizer("nobody/nothing")
except BadModel as error:
    print(len(tries), str(error).replace(chr(10), " "))
"""


def test_a_name_of_an_unreachable_hub_is_tried_once(free_port):
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{free_port}"}
    ended = subprocess.run([sys.executable, "-c", _LOAD], capture_output=True, text=True, env=environment, check=True)
    tries, _, message = ended.stdout.partition(" ")
    assert "cannot be reached" in message
    assert tries == "1", "the library tries again and again, for 46 seconds"


_AGAIN = """
import os
from huggingface_hub import constants
from atomtune import inspect
from atomtune.errors import BadModel
try:
    inspect(os.devnull, "nobody/nothing")
except BadModel as error:
    print("cannot be reached" in str(error), constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE"))
"""


@pytest.mark.slow
def test_a_program_tries_an_unreachable_hub_again(free_port):
    # A notebook that was offline once stayed offline, also for the user's own code, until it was restarted.
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{free_port}"}
    environment.pop("HF_HUB_OFFLINE", None)
    ended = subprocess.run([sys.executable, "-c", _AGAIN], capture_output=True, text=True, env=environment, check=True)
    assert ended.stdout.split() == ["True", "False", "None"], ended.stderr


@pytest.mark.slow
def test_a_hub_that_the_user_switched_off_is_not_called_unreachable():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", _LOAD], capture_output=True, text=True, env=environment, check=True)
    assert "HF_HUB_OFFLINE forbids asking the hub" in ended.stdout
