"""Engine: the interface of programs that serve a model, and HTTP requests to them."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, Protocol

from atomtune.errors import CheckFailed, RunFailed

#: HTTP status codes from this one on are errors of the server.
_SERVER_ERROR = 500
#: Parts of the messages with which llama.cpp and vLLM refuse an id outside of their vocabulary.
_UNKNOWN_TOKENS = ("invalid tokens", "out of vocabulary")
#: The message for that, for all engines.
OF_ANOTHER_BASE = (
    "what it serves has no tokens for some ids of the training's prompts, so it was made of another base; pass "
    "--served with what `atomtune merge` or `atomtune export` wrote for this adapter"
)
#: Seconds to wait for an answer: a small model on a slow CPU needs seconds, a large model minutes for its first one.
ANSWERS_WITHIN = 600
#: Sends requests without a proxy, even if http_proxy is set: no proxy leads to a server of this machine.
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EngineBroke(RunFailed):
    """A running engine failed to answer through its own fault; its output says why."""


class UnknownTokens(CheckFailed):
    """The served model has no tokens for some of our ids, so it is not the model that was trained."""


@dataclass(frozen=True)
class Request:
    """The content of a chat request."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the chat template, for example enable_thinking

    def calls_as_text(self) -> dict[str, str]:
        """For servers that would parse calls out of an answer's text, or refuse tools because they have no parser.

        The tools are still in the prompt.
        """
        return {"tool_choice": "none"} if self.tools else {}

    def body(self) -> dict[str, Any]:
        """The request as JSON, with the names that all OpenAI-compatible servers use."""
        body: dict[str, Any] = {"messages": list(self.messages)}
        if self.tools:
            body["tools"] = list(self.tools)
        if self.variables:
            body["chat_template_kwargs"] = dict(self.variables)
        return body


@dataclass(frozen=True)
class EngineReply:
    """The answer to a chat request."""

    text: str
    stopped: bool  # the model ended it, not the limit
    prompt_tokens: int


class Engine(Protocol):
    """A running engine with one model."""

    name: str
    version: str
    dtype: str  # of the served weights: float32, bfloat16, float16, q8_0

    def __enter__(self) -> "Engine": ...

    def __exit__(self, *exc: Any) -> None: ...

    def prompt_ids(self, request: Request) -> list[int]:
        """The token ids that the engine makes of a chat request."""
        ...

    def log_probabilities(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """Of each answer token, given the prompt and the answer tokens before it."""
        ...

    def chat(self, request: Request, *, max_tokens: int) -> EngineReply:
        """The greedy answer from the OpenAI-compatible endpoint."""
        ...


def post(url: str, body: Mapping[str, Any]) -> Any:
    """Send a JSON request and return the JSON answer.

    Raises EngineBroke for an error of the server, UnknownTokens if its vocabulary is another one, else RunFailed.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with direct.open(request, timeout=ANSWERS_WITHIN) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        reply = error.read().decode(errors="replace")[:600]
        if error.code >= _SERVER_ERROR:
            raise EngineBroke(f"The engine failed on a request ({error.code} at {url}): {reply}") from None
        if any(words in reply for words in _UNKNOWN_TOKENS):
            raise UnknownTokens(OF_ANOTHER_BASE) from None
        raise RunFailed(f"The engine refused a request ({error.code} at {url}): {reply}") from None
    except (OSError, ValueError, HTTPException) as error:  # connection errors, invalid JSON, an incomplete answer
        raise RunFailed(f"The engine does not answer at {url}: {error}") from None


def chat_reply(url: str, model: str, request: Request, *, max_tokens: int, **more: Any) -> EngineReply:
    """A greedy answer from any OpenAI-compatible endpoint.

    more  further keys of the request's body, for this engine only
    """
    greedy = {"model": model, "max_tokens": max_tokens, "temperature": 0, "stream": False, **more}
    answer = post(f"{url}/v1/chat/completions", {**request.body(), **greedy})
    choice = answer["choices"][0]
    return EngineReply(
        text=choice["message"].get("content") or "",
        stopped=choice["finish_reason"] != "length",
        prompt_tokens=int(answer["usage"]["prompt_tokens"]),
    )
