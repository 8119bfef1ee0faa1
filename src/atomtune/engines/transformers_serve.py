"""transformers serve: the server of transformers, for an adapter or a merged folder.

It returns neither log-probabilities nor prompt ids. Both are computed in this process with the same calls that the
server makes, and the server's count of prompt tokens must agree with them.
"""

import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import transformers

from atomtune.engines.engine import EngineReply, Request, chat_reply
from atomtune.engines.server_process import ServerProcess, free_port
from atomtune.engines.transformers_in_process import TransformersInProcess
from atomtune.extras import refuse_missing_packages


def command(
    model: str,
    *,
    host: str,
    port: int,
    dtype: str = "auto",
    variables: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """The command line of the server. It knows the model only by the name given here, and refuses other names.

    variables  of the chat template, for requests that set none
    """
    start = "from transformers.cli.transformers import main; main()"
    words = [sys.executable, "-c", start, "serve", model]
    words += ["--host", host, "--port", str(port), "--dtype", dtype]
    if variables:
        words += ["--chat-template-kwargs", json.dumps(variables)]
    return [*words, "--trust-remote-code"] if trust_remote_code else words


def refuse_without_packages() -> None:
    """Raise BadSettings if the packages that it needs are not installed."""
    refuse_missing_packages(["fastapi", "uvicorn", "openai"], extra="serve", what="transformers serve")


class TransformersServe(TransformersInProcess):
    """A running `transformers serve`."""

    name = "transformers"
    version = transformers.__version__

    def __enter__(self) -> "TransformersServe":
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        with contextlib.ExitStack() as started:
            super().__enter__()
            started.push(super().__exit__)
            words = command(
                self.folder.name,
                host="127.0.0.1",
                port=port,
                dtype=self.dtype,
                trust_remote_code=self.trust_remote_code,
            )
            self.server = ServerProcess(words, health=f"{self.url}/health", folder=self.folder.parent)
            started.enter_context(self.server)
            self._started = started.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._started.__exit__(*exc)

    def chat(self, request: Request, *, max_tokens: int) -> EngineReply:
        self.server.refuse_ended()
        reply = chat_reply(self.url, self.folder.name, request, max_tokens=max_tokens)
        text = reply.text
        # The text contains special tokens, because it is returned as written
        for control in self.tokenizer.all_special_tokens:
            text = text.replace(control, "")
        return replace(reply, text=text)
