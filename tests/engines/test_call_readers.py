"""vLLM's parser for tool calls is chosen by how the template writes a call, not by the model's name."""

import re

import pytest

from atomtune.data.encoding.choose_template import load_template
from atomtune.data.encoding.template_probes import written_call
from atomtune.engines.call_readers import call_reader
from tests.tiny import tokenizer_of

#: How published models write f(a=1), and the name of vLLM's parser for it.
FORMS = {
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>': "hermes",  # Hermes, Qwen3
    "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>": "qwen3_coder",  # Qwen3.5
    "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>": "glm45",
    '[TOOL_CALLS]f[ARGS]{"a": 1}': "mistral",
    '{"name": "f", "parameters": {"a": 1}}': "llama3_json",
    '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>': "openai",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
    '{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>': "deepseek_v3",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>"
    '{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>': "deepseek_v31",
    "<|tool_call_start|>[f(a=1)]<|tool_call_end|>": "lfm2",
    "<|tool_call>call:f{a:1}<tool_call|>": "gemma4",
}


def marks(written: str) -> list[str]:
    """The control tokens in a text."""
    return list(dict.fromkeys(re.findall(r"<[^<>\n=]+>|\[[A-Z_]+\]", written)))


@pytest.mark.parametrize(("written", "reader"), FORMS.items(), ids=FORMS.values())
def test_each_tool_call_format_gets_its_vllm_parser(written, reader):
    tokens = [*marks(written), "<|python_tag|>"]
    assert call_reader(f"<|im_start|>assistant\n{written}<|im_end|>\n", tokens) == reader


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("qwen2.5", "hermes"),
        ("qwen3", "hermes"),
        ("llama3.1", "llama3_json"),
        ("mistral-v3", "mistral"),
        ("mistral-tekken", "mistral"),
        ("atom", None),
        ("chatml", None),
    ],
)
def test_each_builtin_templates_call_format_gets_its_vllm_parser(name, reader):
    written = written_call(load_template(name, tokenizer_of("sentencepiece")))
    assert call_reader(written, ["[TOOL_CALLS]", "<|python_tag|>"]) == reader


def test_no_parser_is_chosen_for_an_unknown_format_or_missing_tokens():
    assert call_reader("CALL f WITH a = 1", ["CALL"]) is None
    # Llama 3.1's template on another base: vLLM would fail at start-up with that parser.
    assert call_reader('{"name": "f", "parameters": {"a": 1}}', ["<|im_end|>"]) is None
