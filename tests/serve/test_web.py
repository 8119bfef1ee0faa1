"""`atomtune web` as a command: what is refused before anything is loaded."""

import socket

import pytest

from atomtune.errors import BadSettings
from atomtune.settings.read import read


@pytest.mark.extra
def test_another_host_needs_a_password_and_a_taken_port_is_said(monkeypatch):
    pytest.importorskip("gradio", reason="needs the extra web")
    from atomtune.serve.web import web

    monkeypatch.delenv("ATOMTUNE_PASSWORD", raising=False)
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BadSettings) as refused:
            web(read("web", ["--adapter_path", "out", "--host", "0.0.0.0", "--port", str(port)]))
    assert "--host 0.0.0.0: other machines could use the model. Pass --password" in str(refused.value)
    assert f"--port {port}: another program listens there." in str(refused.value)


def test_without_gradio_the_command_that_installs_it_is_named(monkeypatch):
    import importlib.util

    from atomtune.serve.web import web

    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gradio" else found(name))
    with pytest.raises(BadSettings, match=r"atomtune web needs gradio, not installed here\.\n  pip install"):
        web(read("web", ["--adapter_path", "out"]))
