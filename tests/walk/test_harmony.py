"""gpt-oss: the trained ids are those of OpenAI's own encoder for the same messages.

The encoder is the package openai-harmony. Its vocabulary normally comes from the internet. Here it is written from the
tokenizer.json of gpt-oss, which has the same words; the encoder refuses a file with another hash. `harmony_messages`
has comments where the published template differs from harmony.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from atomtune.data.encoding.chat_template import Template
from atomtune.data.formats.schema import Schema
from atomtune.data.ledger import Ledger
from atomtune.data.reading.raw import RawRecord
from benchmarks.token_truth import KINDS, TOKENIZERS, stands_in, template_for, with_arguments_as_values
from tests.reading import encode

Message = dict[str, Any]


@pytest.fixture(scope="module")
def harmony(real, tmp_path_factory) -> Iterator[Any]:
    package = pytest.importorskip("openai_harmony")
    folder = tmp_path_factory.mktemp("harmony")
    vocabulary = json.loads((real(TOKENIZERS["gpt-oss"][0]) / "tokenizer.json").read_text())["model"]["vocab"]
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    lines = []
    for word, rank in sorted(vocabulary.items(), key=lambda word_and_rank: word_and_rank[1]):
        lines.append(base64.b64encode(bytes(byte_of[character] for character in word)) + f" {rank}\n".encode())
    Path(folder, "o200k_base.tiktoken").write_bytes(b"".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
        yield package.load_harmony_encoding(package.HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture(scope="module")
def template() -> Template:
    template = template_for("gpt-oss")
    if template is None:
        pytest.skip("its tokenizer is not here, or its published template, which comes with trl")
    return template


def harmony_messages(record: Message, day: str) -> list[Any]:
    """The messages of a record in harmony's form."""
    from openai_harmony import Author, DeveloperContent, Role, SystemContent, ToolDescription
    from openai_harmony import Message as HarmonyMessage

    messages = list(record["messages"])
    developer = DeveloperContent.new()
    if messages[0]["role"] == "system":
        instructions = messages.pop(0)["content"]
        # For an empty text the template writes no developer message; without tools it adds an empty line after a text.
        behind = "" if record.get("tools") else "\n\n"
        if instructions:
            developer = developer.with_instructions(instructions + behind)
    tools = []
    for tool in record.get("tools", []):
        function = tool["function"]
        tools.append(ToolDescription.new(function["name"], function["description"], function["parameters"]))
    if tools:
        developer = developer.with_function_tools(tools)
    dated = SystemContent.new().with_conversation_start_date(day)
    converted = [HarmonyMessage.from_role_and_content(Role.SYSTEM, dated)]
    if developer.instructions or tools:
        converted.append(HarmonyMessage.from_role_and_content(Role.DEVELOPER, developer))
    for message in messages:
        if message["role"] == "user":
            converted.append(HarmonyMessage.from_role_and_content(Role.USER, message["content"]))
        elif message["role"] == "tool":  # the template writes a tool's answer as JSON
            author = Author.new(Role.TOOL, f"functions.{message['name']}")
            answer = HarmonyMessage.from_author_and_content(author, json.dumps(message["content"]))
            converted.append(answer.with_recipient("assistant").with_channel("commentary"))
        else:
            converted += assistants_messages(message)
    return converted


def assistants_messages(message: Message) -> Iterator[Any]:
    """Thoughts, calls and the text for the user: one message each, in its own channel."""
    from openai_harmony import Message as HarmonyMessage
    from openai_harmony import Role

    thoughts, text = message.get("reasoning_content", ""), message["content"] or ""
    if message.get("tool_calls") and not thoughts:
        thoughts = text  # the template writes the text beside a call as thoughts
    if thoughts:
        yield HarmonyMessage.from_role_and_content(Role.ASSISTANT, thoughts).with_channel("analysis")
    for call in map(with_arguments_as_values, message.get("tool_calls", [])):
        arguments = HarmonyMessage.from_role_and_content(Role.ASSISTANT, json.dumps(call["function"]["arguments"]))
        to_tool = arguments.with_channel("commentary").with_recipient(f"functions.{call['function']['name']}")
        yield to_tool.with_content_type("json")  # as in harmony's own examples: "<|constrain|>json"
    if not message.get("tool_calls"):
        yield HarmonyMessage.from_role_and_content(Role.ASSISTANT, text).with_channel("final")


def without_earlier_thoughts(messages: list[Message]) -> list[Message]:
    """The history as a model sees it: without the thoughts of turns that already end in an answer."""
    finished = 0  # index after the last answer to the user before the last message
    for number, message in enumerate(messages[:-1], 1):
        if message["role"] == "assistant" and not message.get("tool_calls"):
            finished = number
    history = [{**message, "reasoning_content": ""} for message in messages[:finished]]
    return [*history, *messages[finished:]]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("thoughts inline", "two calls at once")])
def test_every_prompt_and_answer_has_the_token_ids_of_harmony(harmony, template, kind):
    # Catches a final answer without its channel, a call with two stop tokens, and misplaced thoughts.
    # Two kinds are left out: for harmony, <think> inside a text is text, and the template writes no second call.
    from openai_harmony import Conversation, RenderConversationConfig, Role

    record, day = KINDS[kind], template.day.isoformat()
    raw = RawRecord(record, "a:1")
    (examples,) = encode([raw], template, Ledger(), max_tokens=10_000, schema=Schema("messages"))
    whole = RenderConversationConfig(auto_drop_analysis=False)
    for at, message in enumerate(record["messages"]):
        if message["role"] != "assistant":
            continue
        before = {**record, "messages": record["messages"][:at]}
        prompt = harmony.render_conversation_for_completion(
            Conversation.from_messages(harmony_messages(before, day)), Role.ASSISTANT
        )
        with_answer = {**record, "messages": without_earlier_thoughts(record["messages"][: at + 1])}
        full = harmony.render_conversation_for_training(
            Conversation.from_messages(harmony_messages(with_answer, day)), config=whole
        )
        assert full[: len(prompt)] == prompt
        assert any(stands_in(example, prompt, full[len(prompt) :]) for example in examples), at
