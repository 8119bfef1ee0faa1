"""Laws of the built-in templates: each writes its family's published format, and prompts continue each other."""

import json
from importlib import resources
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from atomtune.choices import TEMPLATES
from atomtune.data.encoding.choose_template import load_template
from atomtune.model.load import load_tokenizer
from tests.tiny import CHATML, lone_sentencepiece, tokenizer_of

NAMES = sorted(TEMPLATES)
TOKENIZERS = ["sentencepiece", "lone", "bytes", "chatml bytes", "characters"]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
#: SentencePiece writes this before every text, so it follows the prompt of an earlier exchange.
GAP = {"mistral-v1": " ", "mistral-v3": " ", "vicuna": " "}
#: The end of an answer, if it is not the tokenizer's eos.
END = {
    **dict.fromkeys(("chatml", "qwen2.5", "qwen3"), "<|im_end|>\n"),
    **dict.fromkeys(("llama3", "llama3.1"), "<|eot_id|>"),
    "gemma": "<end_of_turn>\n",
}
#: They put the system text into the last question, so their prompts do not continue each other.
SYSTEM_LAST = ("mistral-v3", "mistral-tekken")
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": "两", "y": 3}}}
CALLED = [
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "5"},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerBase]:
    folder = tmp_path_factory.mktemp("lone")
    lone_sentencepiece(folder)
    made: dict[str, Any] = {kind: tokenizer_of(kind) for kind in ("sentencepiece", "bytes", "characters")}
    return {**made, "lone": load_tokenizer(folder), "chatml bytes": tokenizer_of("bytes", CHATML)}


@pytest.fixture(scope="module")
def llama(tokenizers: dict[str, PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """A tokenizer with <s> and </s>."""
    return tokenizers["sentencepiece"]


def source(name: str) -> str:
    file = resources.files("atomtune.data") / "templates" / f"{name}.jinja"
    return file.read_text(encoding="utf-8").rstrip("\n")


def render(name: str, tokenizer: Any, messages: list[dict], *, prompt: bool = False, **more: Any) -> str:
    return tokenizer.apply_chat_template(
        messages, chat_template=source(name), tokenize=False, add_generation_prompt=prompt, **more
    )


def chat(*texts: str, system: str | None = None) -> list[dict]:
    """Messages of user and assistant in turn."""
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return said if system is None else [{"role": "system", "content": system}, *said]


# --- what is written, by hand from the published formats --------------------------------------------------------------

WRITTEN = {
    "atom": "<s>Human: S请回答用户问题: 你好\n</s><s>Assistant:a</s><s>Human: S请回答用户问题: q\n</s><s>Assistant:",
    "atom-official": ("<s>System: S\n</s><s>Human: 你好\n</s><s>Assistant: a</s><s>Human: q\n</s><s>Assistant: "),
    "chatml": (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen2.5": (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen3": (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n你好"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "llama3.1": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n你好"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "gemma": (
        "<s><start_of_turn>user\nS\n\n你好<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
        "<start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n"
    ),
    "mistral-v1": "<s> [INST] S\n\n你好 [/INST] a</s> [INST] q [/INST]",
    "mistral-v3": "<s>[INST] 你好[/INST] a</s>[INST] S\n\nq[/INST]",
    "mistral-tekken": "<s>[INST]你好[/INST]a</s>[INST]S\n\nq[/INST]",
    "alpaca": ("<s>S\n\n### Instruction:\n你好\n\n### Response:\na</s>\n\n### Instruction:\nq\n\n### Response:\n"),
    "vicuna": "<s>S USER: 你好 ASSISTANT: a</s>USER: q ASSISTANT:",
    "plain": "<s>S\n你好\na</s>\nq\n",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_with_a_system_prompt_matches_the_published_format(name, llama):
    assert render(name, llama, chat("你好", "a", "q", system="S"), prompt=True) == WRITTEN[name]


@pytest.mark.parametrize(
    ("name", "before"), [("alpaca", f"<s>{ALPACA}\n\n### Instruction:\nq"), ("vicuna", f"<s>{VICUNA} USER: q")]
)
def test_alpaca_and_vicuna_write_their_default_preamble_without_a_system_prompt(name, before, llama):
    assert render(name, llama, chat("q"), prompt=True).startswith(before)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("alpaca", "vicuna", "llama3.1", "qwen2.5")])
def test_templates_without_a_preamble_add_no_default_system_prompt(name, llama):
    # Left out: Llama 3.1 writes dates here, Qwen2.5 its name.
    written = render(name, llama, chat("q"), prompt=True)
    with_system = render(name, llama, chat("q", system="SYSTEM"), prompt=True)
    assert len(written) < len(with_system)
    assert "system" not in written


def test_template_files_match_the_known_names_and_begin_with_a_comment():
    files = sorted(file.name for file in (resources.files("atomtune.data") / "templates").iterdir())
    assert files == sorted(f"{name}.jinja" for name in NAMES)
    for name in NAMES:
        assert source(name).startswith("{#-"), name


# --- a conversation goes on from its own prompts ----------------------------------------------------------------------

# No white space at the ends, which some families trim, and nothing that Qwen reads as thoughts or as a tool's answer.
TEXT = st.text(st.sampled_from("ab 你\n{}%#'\"\\<|>[]é🙂"), min_size=1, max_size=12).filter(
    lambda text: text == text.strip()
)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, min_size=3, max_size=7).filter(lambda texts: len(texts) % 2), system=st.none() | TEXT)
def test_each_prompt_begins_with_the_one_before_and_its_answer(name, kind, tokenizers, texts, system):
    tokenizer = tokenizers[kind]
    eos = tokenizer.eos_token
    end = END.get(name) or eos + ("\n\n" if name == "alpaca" else "")
    first = len(chat(texts[0], system=system))
    if name in SYSTEM_LAST:
        system, first = None, 1
    messages = chat(*texts, system=system)
    for at in range(first, len(messages), 2):
        asked = render(name, tokenizer, messages[:at], prompt=True)
        answered = asked + GAP.get(name, "") + messages[at]["content"] + end
        assert render(name, tokenizer, messages[: at + 2], prompt=True).startswith(answered)
        if name != "qwen3":  # it writes a block for thoughts into the very last answer
            assert render(name, tokenizer, messages[: at + 1]) == answered


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("atom")])
def test_a_conversation_has_one_bos_and_it_is_the_first(name, kind, tokenizers):
    tokenizer = tokenizers[kind]
    written = render(name, tokenizer, chat("q", "a", "q", system="S"), prompt=True)
    if tokenizer.bos_token:
        assert written.startswith(tokenizer.bos_token) and written.count(tokenizer.bos_token) == 1
    else:
        assert written == render(name, tokenizer, chat("q", "a", "q", system="S"), prompt=True, bos_token=None)


@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_a_bos_that_begins_every_turn_is_not_doubled(name):
    # As in SmolLM2 and others, whose BOS is <|im_start|>.
    tokenizer = tokenizer_of("bytes", CHATML)
    tokenizer.bos_token = "<|im_start|>"
    written = render(name, tokenizer, chat("q"), prompt=True)
    assert written == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def test_think_tags_that_are_not_tokens_of_the_tokenizer_are_named():
    # Catches a think block that is silently taught to a model without a token for it.
    tokenizer = tokenizer_of("bytes", CHATML)
    assert load_template("qwen3", tokenizer).unknown_controls == ("</think>", "<think>")
    assert load_template("chatml", tokenizer).unknown_controls == ()
    tokenizer.add_tokens(["<think>", "</think>"])
    assert load_template("qwen3", tokenizer).unknown_controls == ()


@pytest.mark.parametrize("name", NAMES)
def test_white_space_is_kept_unless_the_family_trims(name, llama):
    trims = {"user", "assistant"} if name in ("gemma", "llama3", "llama3.1") else set()
    written = render(name, llama, chat(" \nuser\n ", "\n assistant \n", "q"), prompt=True)
    for role in ("user", "assistant"):
        kept = {"user": " \nuser\n ", "assistant": "\n assistant \n"}[role] in written
        assert kept == (role not in trims)


# --- what a template has no place for ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["alpaca", "atom", "atom-official", "gemma", "llama3", "mistral-v1", "plain", "vicuna"]
)
def test_templates_without_tool_support_refuse_a_tool_result(name, llama):
    with pytest.raises(TemplateError, match=rf'the {name} template has no place.*role "tool"'):
        render(name, llama, [*chat("q"), {"role": "tool", "name": "add", "content": "5"}])


@pytest.mark.parametrize(
    "name", ["alpaca", "atom-official", "chatml", "gemma", "llama3", "mistral-v1", "plain", "vicuna"]
)
def test_templates_without_tool_support_refuse_a_tool_call(name, llama):
    with pytest.raises(TemplateError, match=rf'the {name} template has no place.*"assistant" that calls a tool'):
        render(name, llama, CALLED[:2])


@pytest.mark.parametrize("name", ["llama3.1", "mistral-v3"])
def test_text_beside_a_tool_call_is_refused_if_one_would_be_lost(name, llama):
    spoken = [CALLED[0], {**CALLED[1], "content": "Let me see."}]
    with pytest.raises(TemplateError, match="calls a tool and says something"):
        render(name, llama, spoken, tools=[TOOL])


@pytest.mark.parametrize("name", ["gemma", "mistral-v1", "mistral-v3"])
@pytest.mark.parametrize("roles", ["uu", "a", "uaa", "us", "s"])
def test_strictly_alternating_templates_refuse_any_other_role_order(name, roles, llama):
    said = {"u": "user", "a": "assistant", "s": "system"}
    messages = [{"role": said[one], "content": "x"} for one in roles]
    with pytest.raises(TemplateError, match="take turns"):
        render(name, llama, messages)


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama3.1", "qwen2.5", "qwen3"])
def test_an_unknown_role_is_refused(name, llama):
    with pytest.raises(TemplateError, match=rf'the {name} template has no place.*"judge"'):
        render(name, llama, [*chat("q"), {"role": "judge", "content": "guilty"}])


# --- tools and thoughts -----------------------------------------------------------------------------------------------


def test_qwen_writes_tools_calls_and_tool_results_as_published(tokenizers):
    written = render("qwen3", tokenizers["bytes"], chat(system="S") + CALLED, prompt=True, tools=[TOOL])
    assert written == (
        "<|im_start|>system\nS\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        f"{json.dumps(TOOL)}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n2+3?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"x": "两", "y": 3}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_qwen_joins_several_tool_results_in_one_turn(tokenizers):
    answers = [{"role": "tool", "name": "add", "content": text} for text in ("5", "6")]
    written = render("qwen3", tokenizers["bytes"], [*CALLED[:2], *answers], prompt=True)
    assert written.endswith(
        "<|im_start|>user\n<tool_response>\n5\n</tool_response>\n<tool_response>\n6\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("inside", [True, False])
def test_qwen_keeps_reasoning_only_after_the_last_question(tokenizers, inside):
    def thought(text: str) -> dict:
        if inside:
            return {"role": "assistant", "content": f"<think>\nhm {text}\n</think>\n\n{text}"}
        return {"role": "assistant", "content": text, "reasoning_content": f"hm {text}"}

    messages = [*chat("q1"), thought("a1"), *chat("q2"), thought("a2")]
    assert render("qwen3", tokenizers["bytes"], messages) == (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n<think>\nhm a2\n</think>\n\na2<|im_end|>\n"
    )


def test_qwen_keeps_reasoning_between_a_tool_call_and_the_answer(tokenizers):
    messages = [CALLED[0], {**CALLED[1], "reasoning_content": "add them"}, CALLED[2], *chat("q", "5")[1:]]
    assert render("qwen3", tokenizers["bytes"], messages) == (
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n<think>\nadd them\n</think>\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"x": "两", "y": 3}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n5<|im_end|>\n"
    )


def test_qwen_without_thinking_closes_the_block_in_the_prompt(tokenizers):
    asked = render("qwen3", tokenizers["bytes"], chat("q"), prompt=True, enable_thinking=False)
    assert asked == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert render("qwen3", tokenizers["bytes"], chat("q", "a")).startswith(asked + "a")


def test_llama31_lists_tools_in_the_first_question(llama):
    assert render("llama3.1", llama, chat(system="S") + CALLED, prompt=True, tools=[TOOL]) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
        'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
        "argument name and its value}.Do not use variables.\n\n"
        f"{json.dumps(TOOL, indent=4)}\n\n2+3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "add", "parameters": {"x": "两", "y": 3}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"5"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
    )


def test_mistral_lists_tools_before_the_last_question(llama):
    messages = [*chat("hi", "ho"), *CALLED, *chat("q", "5")[1:]]
    assert render("mistral-v3", llama, messages, tools=[TOOL]) == (
        f"<s>[INST] hi[/INST] ho</s>[AVAILABLE_TOOLS] [{json.dumps(TOOL)}][/AVAILABLE_TOOLS][INST] 2+3?[/INST]"
        '[TOOL_CALLS] [{"name": "add", "arguments": {"x": "两", "y": 3}}]</s>'
        '[TOOL_RESULTS] {"content": 5}[/TOOL_RESULTS] 5</s>'
    )


def test_mistral_writes_the_ids_of_calls_where_there_are_any(llama):
    call = {**CALLED[1], "tool_calls": [{**CALL, "id": "abcdefghi"}]}
    written = render("mistral-v3", llama, [CALLED[0], call, {**CALLED[2], "tool_call_id": "abcdefghi"}])
    assert written.endswith(
        '[TOOL_CALLS] [{"name": "add", "arguments": {"x": "两", "y": 3}, "id": "abcdefghi"}]</s>'
        '[TOOL_RESULTS] {"content": 5, "call_id": "abcdefghi"}[/TOOL_RESULTS]'
    )
