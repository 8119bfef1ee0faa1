"""Each built-in template of a model generation writes the published format: checked on 500 random conversations.

Compared with the templates in the package trl and with the encoders of the package mistral-common, both unchanged. The
tests are skipped if these are not installed.
"""

import json
import os
import random
import shutil
from functools import cache
from importlib import resources, util
from pathlib import Path
from typing import Any

import pytest

from atomtune.choices import RENAMED_TEMPLATES, SPLIT_TEMPLATES, TEMPLATES
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.encoding.omissions import NOT_WRITTEN
from atomtune.data.formats.schema import Schema
from atomtune.data.ledger import Ledger
from atomtune.data.reading.raw import RawRecord
from atomtune.data.tokenizer import Tokenizer
from atomtune.errors import BadSettings
from atomtune.model.load import load_tokenizer
from tests.reading import encode
from tests.tiny import tokenizer_of

Message = dict[str, Any]
#: Conversations per template; `make fuzz` uses more.
CONVERSATIONS = int(os.environ.get("ATOMTUNE_FUZZ", "200"))
WORDS = ["a", "Paris", "你好", "1.5", "{x}", "'", '"', "\\", "<b>", "\n", "\n\n", "  ", "é🙂", "# x", "INST", "think"]
#: built-in name → (the file in trl, what a conversation may contain)
PUBLISHED = {
    "qwen2.5": ("qwen2_5", {"system", "tools", "beside"}),
    "qwen3": ("qwen3", {"system", "tools", "beside", "thoughts"}),
    "llama3": ("llama3", {"system"}),
    "llama3.1": ("llama3_1", {"system", "tools"}),
    "gemma": ("gemma3", {"system"}),
}
#: built-in name → the tokenizer file in mistral-common
MISTRAL = {
    "mistral-v1": "tokenizer.model.v1",
    "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral-tekken": "tekken_240718.json",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds 两 numbers.",
        "parameters": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
    },
}


class Talk:
    """Random conversations, the same for the same seed."""

    def __init__(self, seed: int, holds: set[str], *, tidy: bool = False) -> None:
        self.random = random.Random(seed)
        self.holds = holds
        self.tidy = tidy  # no white space at the ends, no empty texts
        self.tools = [TOOL] if "tools" in holds and self.random.random() < 0.5 else None

    def text(self) -> str:
        text = "".join(self.random.choices(WORDS, k=self.random.randint(1, 6)))
        return text.strip() or "x" if self.tidy else text

    def answer(self, **more: Any) -> Message:
        message: Message = {"role": "assistant", "content": self.text(), **more}
        if "thoughts" in self.holds and self.random.random() < 0.5:
            message["reasoning_content"] = self.text()
        return message

    def called(self) -> list[Message]:
        """A call and the tool's answer."""
        number = "".join(self.random.choices("abcdefgh12345", k=9))
        function = {"name": "add", "arguments": {"x": self.random.randint(0, 99), "y": self.text()}}
        call = self.answer(tool_calls=[{"id": number, "type": "function", "function": function}])
        if "beside" not in self.holds or self.random.random() < 0.5:
            call["content"] = ""
        text = self.text()
        if text[0] in '{["':  # mistral-v3 writes what only looks like JSON differently; see the head of its template
            text = f"x{text}"
        values = ["5", "5.25", '{"sum": [1, "两"]}', "true"]
        answered = self.random.choice(values if "values" in self.holds else [text, *values])
        return [call, {"role": "tool", "name": "add", "tool_call_id": number, "content": answered}]

    def messages(self) -> list[Message]:
        system = "system" in self.holds and self.random.random() < 0.5
        messages: list[Message] = [{"role": "system", "content": self.text()}] if system else []
        for _ in range(self.random.randint(1, 4)):
            messages.append({"role": "user", "content": self.text()})
            if self.tools and self.random.random() < 0.5:
                messages += self.called()
            messages.append(self.answer())
        return messages


def built_in_source(name: str) -> str:
    return (resources.files("atomtune.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_built_in_template_renders_like_the_published_one(name: str) -> None:
    trl = util.find_spec("trl")
    if trl is None or trl.origin is None:
        pytest.skip("trl is not installed")
    file, holds = PUBLISHED[name]
    published = (Path(trl.origin).parent / "chat_templates" / f"{file}.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_of("bytes" if name.startswith("qwen") else "sentencepiece")

    def written(source: str, talk: Talk, messages: list[Message], prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=source, tools=talk.tools, tokenize=False, add_generation_prompt=prompt
            )
        )

    for seed in range(CONVERSATIONS):
        talk = Talk(seed, holds)
        messages = talk.messages()
        for until, prompt in ((len(messages) - 1, True), (len(messages), False)):
            ours = written(built_in_source(name), talk, messages[:until], prompt)
            assert ours == written(published, talk, messages[:until], prompt), seed


# --- Mistral: the ids of its own encoders -----------------------------------------------------------------------------


@cache
def mistral_encoder(name: str) -> Any:
    pytest.importorskip("mistral_common", minversion="1.13")  # 1.12 gives other ids
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_file(str(mistral_file(name)), mode=ValidationMode.finetuning)


def mistral_file(name: str) -> Path:
    spec = util.find_spec("mistral_common")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "data" / MISTRAL[name]


def encoded_by_mistral(name: str, messages: list[Message], tools: list[Message] | None) -> Any:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    as_sent = []
    for message in messages:
        sent = {key: value for key, value in message.items() if not (key == "content" and message.get("tool_calls"))}
        if "tool_calls" in sent:
            sent["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
                for call in sent["tool_calls"]
            ]
        as_sent.append(sent)
    request = ChatCompletionRequest.from_openai(messages=as_sent, tools=tools)
    return mistral_encoder(name).encode_chat_completion(request)


def mistral_tokenizer(name: str, folder: Path) -> Tokenizer:
    """The tokenizer in mistral-common, loaded by transformers."""
    mistral_encoder(name)
    is_tekken = name == "mistral-tekken"
    shutil.copy(mistral_file(name), folder / ("tekken.json" if is_tekken else "tokenizer.model"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": False}
    if not is_tekken:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    return load_tokenizer(str(folder))


def assert_ids_of_the_encoder(
    name: str, template: Template, talk: Talk, messages: list[Message], *, system_after_tools: bool = True
) -> Ledger:
    """Each answer ends an Example that begins with the encoder's ids of the messages before it.

    system_after_tools  the template also writes the system text into a prompt that ends with a tool's answer
    """
    record = {"messages": messages, **({"tools": talk.tools} if talk.tools else {})}
    ledger = Ledger()
    records = encode([RawRecord(record, "a:1")], template, ledger, max_tokens=10**5, schema=Schema("messages"))
    assert not ledger.records_refused
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        sent = messages[: at + 1]
        if not system_after_tools and messages[at - 1]["role"] == "tool":
            sent = [message for message in sent if message["role"] != "system"]
        expected = encoded_by_mistral(name, sent, talk.tools).tokens
        assert any(list(example.ids[: len(expected)]) == expected for example in records[0]), (messages, at)
    return ledger


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "mistral-tekken" else name for name in MISTRAL]
)
def test_training_ids_for_mistral_match_its_own_encoder(name: str, tmp_path: Path) -> None:
    # Catches lost ids of calls, a system text in another question, a missing or added space, and a tokenizer that reads
    # [INST] as text.
    template = load_template(name, mistral_tokenizer(name, tmp_path))
    assert template.unknown_controls == ()  # in version 1, [INST] is text
    holds = {"system"} if name == "mistral-v1" else {"system", "tools"}
    for seed in range(CONVERSATIONS):
        talk = Talk(seed, holds, tidy=True)
        assert_ids_of_the_encoder(name, template, talk, talk.messages())


# --- Mistral: its own published templates -----------------------------------------------------------------------------

#: Like the templates of Mistral-7B-Instruct-v0.3 (SPACE is a space) and Mistral-Nemo-Instruct-2407 (SPACE is empty):
#: the tools before the last question, the system text in it if it is the last message, each call with its id, ids of
#: another length refused, and a tool's answer unchanged.
AS_PUBLISHED = """\
{%- set talk = messages[1:] if messages[0].role == 'system' else messages -%}
{%- set questions = talk | selectattr('role', 'equalto', 'user') | list -%}
{%- macro id_of(id) -%}
    {%- if not id or id | length != 9 -%}
        {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
    {%- endif -%}
    {{- id -}}
{%- endmacro -%}
{%- set turns = namespace(count=0) -%}
{%- for message in talk if message.role != 'tool' and not message.tool_calls -%}
    {%- if (message.role == 'user') != (turns.count % 2 == 0) -%}
        {{- raise_exception('conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- set turns.count = turns.count + 1 -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in talk -%}
    {%- if message.role == 'user' -%}
        {%- if tools and message == questions[-1] -%}
            {{- '[AVAILABLE_TOOLS]SPACE' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {{- '[INST]SPACE' -}}
        {%- if loop.last and messages[0].role == 'system' -%}
            {{- messages[0].content + '\n\n' -}}
        {%- endif -%}
        {{- message.content + '[/INST]' -}}
    {%- elif message.tool_calls -%}
        {{- '[TOOL_CALLS]SPACE[' -}}
        {%- for call in message.tool_calls -%}
            {{- (call.function | tojson)[:-1] + ', "id": "' + id_of(call.id) + '"}' -}}
            {{- ', ' if not loop.last -}}
        {%- endfor -%}
        {{- ']' + eos_token -}}
    {%- elif message.role == 'tool' -%}
        {{- '[TOOL_RESULTS]SPACE{"content": ' + message.content + ', "call_id": "' + id_of(message.tool_call_id) -}}
        {{- '"}[/TOOL_RESULTS]' -}}
    {%- else -%}
        {{- 'SPACE' + message.content + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""


def mistral_with_its_own_template(name: str, folder: Path) -> Template:
    tokenizer = mistral_tokenizer(name, folder)
    tokenizer.chat_template = AS_PUBLISHED.replace("SPACE", "" if name == "mistral-tekken" else " ")
    return load_template("auto", tokenizer)


@pytest.mark.parametrize("name", ["mistral-v3", pytest.param("mistral-tekken", marks=pytest.mark.slow)])
def test_mistrals_published_template_gives_the_ids_of_its_encoder(name: str, tmp_path: Path) -> None:
    # Catches ids of calls that do not reach the template, which then refuses the record; and tools or a system text
    # that move once the answer is there.
    template = mistral_with_its_own_template(name, tmp_path)
    calls = 0
    for seed in range(CONVERSATIONS):
        talk = Talk(seed, {"system", "tools", "values"}, tidy=True)
        messages = talk.messages()
        if messages[0]["role"] == "system":
            messages[0]["content"] += " Answer briefly."  # unique, so that its loss is detected
        questions = [message["content"] for message in messages if message["role"] == "user"]
        if len(set(questions)) < len(questions):
            continue  # such a template cannot tell equal questions apart
        calls += sum("tool_calls" in message for message in messages)
        ledger = assert_ids_of_the_encoder(name, template, talk, messages, system_after_tools=False)
        roles = {message["role"] for message in messages}
        assert (NOT_WRITTEN["system"] in ledger.notices) == (roles >= {"system", "tool"})
    assert calls > CONVERSATIONS / 4


@pytest.mark.parametrize("call_id", ["", "abc", "call_0123456789"])
def test_a_record_with_call_ids_rejected_by_mistrals_template_is_refused(call_id: str, tmp_path: Path) -> None:
    template = mistral_with_its_own_template("mistral-v3", tmp_path)
    talk = Talk(0, {"tools"}, tidy=True)
    talk.tools = [TOOL]
    called, answer = talk.called()
    called["tool_calls"][0]["id"] = answer["tool_call_id"] = call_id
    record = {"tools": [TOOL], "messages": [{"role": "user", "content": "1 + 2?"}, called, answer, talk.answer()]}
    ledger = Ledger()
    assert not encode([RawRecord(record, "a:1")], template, ledger, max_tokens=10**5, schema=Schema("messages"))
    assert "Tool call IDs should be alphanumeric strings with length 9!" in ledger.records_refused[0].reason


# --- names ------------------------------------------------------------------------------------------------------------


def test_template_names_in_help_match_the_existing_templates() -> None:
    folder = resources.files("atomtune.data") / "templates"
    assert sorted(f"{name}.jinja" for name in TEMPLATES) == sorted(file.name for file in folder.iterdir())
    assert not {*RENAMED_TEMPLATES, *SPLIT_TEMPLATES} & set(TEMPLATES)


def test_an_old_template_name_still_works_or_lists_its_replacements() -> None:
    assert load_template("qwen", tokenizer_of("bytes")).name == "qwen3"
    with pytest.raises(BadSettings, match=r"mistral-v1 .*mistral-v3 .*mistral-tekken"):
        load_template("mistral", tokenizer_of("bytes"))
