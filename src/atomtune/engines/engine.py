"""Engine: what is asked of a program that serves a model, and how it is asked."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, Protocol

from atomtune.errors import CheckFailed, RunFailed

#: From here on a status says that the server is at fault.
_SERVER_ERROR = 500
#: By which llama.cpp and vLLM refuse an id that their vocabulary does not have.
_UNKNOWN_TOKENS = ("invalid tokens", "out of vocabulary")
#: What is said of that, by whichever engine.
OF_ANOTHER_BASE = (
    "The engine does not serve the tuned model: what it serves has no tokens for some ids of the training's prompts, "
    "so it was made of another base.\nPass --served with what `atomtune merge` or `atomtune export` wrote for this "
    "adapter."
)
#: One answer of a small model on a slow CPU takes seconds, the first one of a large model minutes.
ANSWERS_WITHIN = 600
#: Asks without a proxy, whatever the environment says (http_proxy): no proxy leads to a server of this machine.
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EngineBroke(RunFailed):
    """An engine that runs could not answer, by its own fault: its output tells why."""


class UnknownTokens(CheckFailed):
    """What an engine serves has no tokens for ids of ours, so it is not the model that was trained."""


@dataclass(frozen=True)
class Request:
    """What a chat request holds."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the chat template, as enable_thinking

    def calls_as_text(self) -> dict[str, str]:
        """For a server that would take calls out of an answer's text, or refuse tools where it has no reader of calls.

        The tools stand in the prompt all the same.
        """
        return {"tool_choice": "none"} if self.tools else {}

    def body(self) -> dict[str, Any]:
        """As JSON, in the names that OpenAI-compatible servers share."""
        body: dict[str, Any] = {"messages": list(self.messages)}
        if self.tools:
            body["tools"] = list(self.tools)
        if self.variables:
            body["chat_template_kwargs"] = dict(self.variables)
        return body


@dataclass(frozen=True)
class Reply:
    """What a chat request is answered with."""

    text: str
    stopped: bool  # by itself, not at the limit
    prompt_tokens: int


class Engine(Protocol):
    """A running engine with one model."""

    name: str
    version: str
    dtype: str  # number format of the weights it serves: float32, bfloat16, float16, q8_0

    def __enter__(self) -> "Engine": ...

    def __exit__(self, *exc: Any) -> None: ...

    def prompt_ids(self, request: Request) -> list[int]:
        """The ids it makes of a chat request."""
        ...

    def log_probabilities(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """Of each answer token behind the prompt and the answer tokens before it."""
        ...

    def chat(self, request: Request, *, max_tokens: int) -> Reply:
        """Its greedy answer, over its OpenAI-compatible endpoint."""
        ...


def post(url: str, body: Mapping[str, Any], *, api_key: str | None = None) -> Any:
    """A JSON request and its JSON answer.

    Raises RunFailed with its words, EngineBroke where it is at fault, UnknownTokens where its vocabulary is another.
    """
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with direct.open(request, timeout=ANSWERS_WITHIN) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:600]
        if error.code >= _SERVER_ERROR:
            raise EngineBroke(f"The engine failed on a request ({error.code} at {url}): {said}") from None
        if any(words in said for words in _UNKNOWN_TOKENS):
            raise UnknownTokens(OF_ANOTHER_BASE) from None
        raise RunFailed(f"The engine refused a request ({error.code} at {url}): {said}") from None
    except (OSError, ValueError, HTTPException) as error:  # of a connection, of JSON, of half an answer
        raise RunFailed(f"The engine does not answer at {url}: {error}") from None


def chat_reply(url: str, model: str, request: Request, *, max_tokens: int, **more: Any) -> Reply:
    """A greedy answer from any OpenAI-compatible endpoint.

    more  of the request's body, which this engine alone has
    """
    greedy = {"model": model, "max_tokens": max_tokens, "temperature": 0, "stream": False, **more}
    answer = post(f"{url}/v1/chat/completions", {**request.body(), **greedy})
    choice = answer["choices"][0]
    return Reply(
        text=choice["message"].get("content") or "",
        stopped=choice["finish_reason"] != "length",
        prompt_tokens=int(answer["usage"]["prompt_tokens"]),
    )
