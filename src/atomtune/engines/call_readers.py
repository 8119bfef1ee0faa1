"""Call readers: which of vLLM's tool-call parsers fits, by how the template writes a call."""

import re
from collections.abc import Container
from typing import NamedTuple


class _CallReader(NamedTuple):
    """One of vLLM's tool-call parsers."""

    name: str
    form: str  # regex that matches how its templates write a call of f with {"a": 1}
    needs: str = ""  # token without which vLLM does not start with this parser


_CALL_READERS = (
    _CallReader("hermes", r"<tool_call>\s*\{"),
    _CallReader("qwen3_coder", r"<tool_call>\s*<function="),
    _CallReader("glm45", r"<tool_call>f\s*<arg_key>"),
    _CallReader("mistral", r"\[TOOL_CALLS\]", needs="[TOOL_CALLS]"),
    _CallReader("llama3_json", r'"parameters": *\{"a": 1\}', needs="<|python_tag|>"),
    _CallReader("openai", r"to=functions\.f", needs="<|channel|>"),
    _CallReader("deepseek_v3", r"<｜tool▁sep｜>f\s*```json", needs="<｜tool▁calls▁begin｜>"),
    _CallReader("deepseek_v31", r"f<｜tool▁sep｜>", needs="<｜tool▁calls▁begin｜>"),
    _CallReader("lfm2", r"<\|tool_call_start\|>\[f\(", needs="<|tool_call_start|>"),
    _CallReader("gemma4", r"<\|tool_call>call:f"),
)


def call_reader(written: str, tokens: Container[str]) -> str | None:
    """The name of vLLM's parser for calls written like this one; None if none is known, or if it could not start.

    written  the turn that calls f with {"a": 1}, as the template writes it
    tokens   vocabulary of the tokenizer
    """
    for reader in _CALL_READERS:
        if re.search(reader.form, written):
            return reader.name if not reader.needs or reader.needs in tokens else None
    return None
