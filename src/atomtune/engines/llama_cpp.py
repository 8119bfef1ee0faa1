"""llama.cpp: for a GGUF, through the package xllamacpp, its server in a process of its own."""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from atomtune.engines.engine import Reply, Request, chat_reply, post
from atomtune.engines.server_process import ServerProcess, free_port
from atomtune.errors import BadModel
from atomtune.extras import refuse_missing

#: Added to a token's logit so that it is sampled; the log-probability in the answer is that before the addition.
_FORCED = 1e4
#: More than any vocabulary holds.
_ALL = 1_000_000


def command(file: Path, *, host: str, port: int, context: int, variables: Mapping[str, Any] | None = None) -> list[str]:
    """The words that start it; an API key goes by the environment (ATOMTUNE_API_KEY), which no other user can read.

    context    tokens; 0: as the model was trained
    variables  of the chat template, where a request sets none
    """
    words = [sys.executable, "-m", "atomtune.engines.llama_cpp_server", str(file)]
    words += ["--host", host, "--port", str(port), "--context", str(context)]
    return [*words, "--variables", json.dumps(variables)] if variables else words


def refuse_without_packages() -> None:
    """Raise BadSettings where xllamacpp is not installed."""
    refuse_missing(["xllamacpp"], extra="gguf", what="llama.cpp")


def weights_format(file: Path) -> str:
    """The number format of a GGUF's matrices, from the file itself: bf16, f16, q8_0, …"""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, OSError, LookupError, OverflowError) as error:  # of half a file, an index beyond its end
        raise BadModel(f"{file}: not readable as a GGUF: {error}") from error
    kinds = [tensor.tensor_type.name.lower() for tensor in reader.tensors if len(tensor.shape) > 1]
    return max(set(kinds), key=kinds.count) if kinds else "f32"


class LlamaCpp:
    """A running llama.cpp server."""

    name = "llama.cpp"

    def __init__(self, file: Path, *, context: int) -> None:
        refuse_without_packages()
        self.file, self.version = file, f"xllamacpp {version('xllamacpp')}"
        names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
        kind = weights_format(file)
        self.dtype = names.get(kind, kind)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        words = command(file, host="127.0.0.1", port=port, context=context)
        self.server = ServerProcess(words, health=f"{self.url}/health")

    def __enter__(self) -> "LlamaCpp":
        self.server.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.server.__exit__(*exc)

    def prompt_ids(self, request: Request) -> list[int]:
        prompt = post(f"{self.url}/apply-template", request.body())["prompt"]
        return list(
            post(f"{self.url}/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
        )

    def log_probabilities(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """Token by token: each is forced, and the server tells how likely it was. What was computed is kept."""
        scores: list[float] = []
        for i, token in enumerate(answer):
            context = [*prompt, *answer[:i]]
            entry = self._forced(context, token, likeliest=1)
            if entry is None:  # it ends inside a character, and the server's answer leaves such a token out
                entry = self._one_of_all(context, token, whole=prompt[-1])
            scores.append(float(entry["logprob"]))
        return scores

    def _forced(self, context: Sequence[int], token: int, *, likeliest: int) -> dict[str, Any] | None:
        """The server's entry of this token when it is sampled behind the context; None where it gives none."""
        body = {
            "prompt": list(context),
            "n_predict": 1,
            "temperature": 0,
            "n_probs": likeliest,
            "logit_bias": [[token, _FORCED]],
            "cache_prompt": True,
        }
        entries = post(f"{self.url}/completion", body).get("completion_probabilities")
        if not entries:
            return None
        entry: dict[str, Any] = entries[0]
        assert entry["id"] == token, f"token {token} was forced, {entry['id']} came"
        return entry

    def _one_of_all(self, context: Sequence[int], token: int, *, whole: int) -> dict[str, Any]:
        """The entry of this token among all of the vocabulary, given when a whole character is sampled instead."""
        sampled = self._forced(context, whole, likeliest=_ALL)
        assert sampled is not None, f"token {whole} ends inside a character too"
        entry: dict[str, Any] = next(entry for entry in sampled["top_logprobs"] if entry["id"] == token)
        return entry

    def chat(self, request: Request, *, max_tokens: int) -> Reply:
        self.server.refuse_ended()
        # What the model writes, as it writes it: the server would take thoughts and calls out of the text, and with
        # tools let it write nothing but what its grammar of calls allows.
        as_written = {"reasoning_format": "none", **request.calls_as_text()}
        return chat_reply(self.url, self.file.stem, request, max_tokens=max_tokens, **as_written)
