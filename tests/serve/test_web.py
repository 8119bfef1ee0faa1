"""`atomtune web` as a command: what it refuses before anything is loaded."""

import os
import socket
import subprocess
import sys

import pytest

from atomtune.engines.server_process import free_port
from atomtune.errors import BadSettings
from atomtune.settings.read import read


@pytest.mark.extra
def test_an_open_host_without_a_password_and_a_port_in_use_are_reported(monkeypatch):
    pytest.importorskip("gradio", reason="needs the extra web")
    from atomtune.serve.web import web

    monkeypatch.delenv("ATOMTUNE_PASSWORD", raising=False)
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BadSettings) as refused:
            web(read("web", ["--adapter_path", "out", "--host", "0.0.0.0", "--port", str(port)]))
    assert "--host 0.0.0.0: other machines could use the model. Pass --password" in str(refused.value)
    assert f"--port {port}: another program is listening there." in str(refused.value)


@pytest.mark.slow
def test_a_port_taken_during_model_loading_is_reported(by_heart, monkeypatch, tmp_path):
    """Gradio raised its own error, which looked like a bug, and the page's folder stayed."""
    pytest.importorskip("gradio", reason="needs the extra web")
    from atomtune.serve import web as module

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    port, loads, others = free_port(), module.load_tuned, []

    def load_tuned(*arguments: object, **more: object) -> object:
        others.append(socket.create_server(("127.0.0.1", port)))
        return loads(*arguments, **more)

    monkeypatch.setattr(module, "load_tuned", load_tuned)
    with pytest.raises(BadSettings, match=f"--port {port}: another program is listening there"):
        module.web(read("web", ["--adapter_path", str(by_heart), "--port", str(port), "--dtype", "float32"]))
    others[0].close()
    assert not list(tmp_path.glob("atomtune-web-*"))


def test_without_gradio_the_command_that_installs_it_is_named(monkeypatch):
    import importlib.util

    from atomtune.serve.web import web

    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gradio" else found(name))
    with pytest.raises(BadSettings, match=r"atomtune web needs gradio, not installed here\.\n  pip install"):
        web(read("web", ["--adapter_path", "out"]))


@pytest.mark.slow
def test_a_proxy_environment_variable_does_not_stop_the_page_from_starting(by_heart, tmp_path):
    """Gradio requests its own page to check it. With http_proxy set, the command ended as if by a bug."""
    pytest.importorskip("gradio", reason="needs the extra web")
    environment = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    environment |= {"http_proxy": "http://127.0.0.1:9", "TMPDIR": str(tmp_path)}  # nothing listens there
    words = [sys.executable, "-m", "atomtune", "web", "--adapter_path", str(by_heart), "--port", str(free_port())]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        assert any(line.startswith("ready: ") for line in process.stdout)
    finally:
        process.kill()
        process.communicate()
    assert list(tmp_path.glob("atomtune-web-*")), "left by a killed process, until the next one starts"
