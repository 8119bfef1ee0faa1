"""llama.cpp: serves a GGUF with the package xllamacpp, in a process of its own."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from atomtune.engines.engine import EngineReply, Request, chat_reply, post
from atomtune.engines.server_process import ServerProcess, free_port
from atomtune.errors import BadModel
from atomtune.extras import refuse_missing_packages

#: Added to a token's logit to force it. The log-probability in the answer is the one before this is added.
_FORCED = 1e4
#: A number larger than any vocabulary.
_ALL = 1_000_000


def command(file: Path, *, host: str, port: int, context: int, variables: Mapping[str, Any] | None = None) -> list[str]:
    """The command line of the server.

    An API key is passed in the environment variable ATOMTUNE_API_KEY, which other users cannot read.
    context    in tokens; 0: as the model was trained
    variables  of the chat template, for requests that set none
    """
    words = [sys.executable, "-m", "atomtune.engines.llama_cpp_server", str(file)]
    words += ["--host", host, "--port", str(port), "--context", str(context)]
    return [*words, "--variables", json.dumps(variables)] if variables else words


def refuse_without_packages() -> None:
    """Raise BadSettings if xllamacpp is not installed."""
    refuse_missing_packages(["xllamacpp"], extra="gguf", what="llama.cpp")


def weights_format(file: Path) -> str:
    """The most common format of a GGUF's matrices, read from the file: bf16, f16, q8_0, …"""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, OSError, LookupError, OverflowError) as error:  # an incomplete file, an index beyond its end
        raise BadModel(f"{file}: not readable as a GGUF: {error}") from error
    kinds = Counter(tensor.tensor_type.name.lower() for tensor in reader.tensors if len(tensor.shape) > 1)
    return kinds.most_common(1)[0][0] if kinds else "f32"


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
        """Score one token at a time: it is forced, and the server returns its log-probability.

        The prompt stays cached.
        """
        scores: list[float] = []
        for i, token in enumerate(answer):
            context = [*prompt, *answer[:i]]
            entry = self._forced(context, token, likeliest=1)
            if entry is None:  # the token ends inside a character; the server leaves such tokens out
                entry = self._one_of_all(context, token, whole=prompt[-1])
            scores.append(float(entry["logprob"]))
        return scores

    def _forced(self, context: Sequence[int], token: int, *, likeliest: int) -> dict[str, Any] | None:
        """The server's entry for this token, sampled after the context; None if it returns none."""
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
        """This token's entry among the whole vocabulary, listed when `whole`, a complete character, is sampled."""
        sampled = self._forced(context, whole, likeliest=_ALL)
        assert sampled is not None, f"token {whole} ends inside a character too"
        entry: dict[str, Any] = next(entry for entry in sampled["top_logprobs"] if entry["id"] == token)
        return entry

    def chat(self, request: Request, *, max_tokens: int) -> EngineReply:
        self.server.refuse_ended()
        # Return the text as the model writes it. Otherwise the server would remove thoughts and calls from it, and with
        # tools its grammar would restrict the text to calls.
        as_written = {"reasoning_format": "none", **request.calls_as_text()}
        return chat_reply(self.url, self.file.stem, request, max_tokens=max_tokens, **as_written)
