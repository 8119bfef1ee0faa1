"""Every answer of a conversation is trained after the prompt that a server would get.

1,000 generated conversations × 6 tokenizers × all built-in templates. The oracle renders each prompt with the
tokenizer's own apply_chat_template and tokenizes it in one call, and the answer separately. It does not use Examples.
"""

import os
import random
from functools import cache
from typing import Any

import pytest

from atomtune.choices import TEMPLATES
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.formats.schema import Schema
from atomtune.data.ledger import Ledger
from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import Example
from tests.reading import encode
from tests.tiny import CHATML, GEMMA, tokenizer_of

#: For each tokenizer and template; `make fuzz` uses more.
CONVERSATIONS = int(os.environ.get("ATOMTUNE_FUZZ", "60"))
TOKENIZERS = {
    "sentencepiece": ("sentencepiece", None),
    "sentencepiece with turns": ("sentencepiece", GEMMA),
    "sentencepiece without a prefix": ("sentencepiece", None),
    "bytes": ("bytes", None),
    "bytes with ChatML": ("bytes", CHATML),
    "characters": ("characters", None),
}
WORDS = [
    "你好",
    "谁",
    "灯塔",
    "。",
    "Hello",
    " world",
    "!",
    "\n",
    "  ",
    "1+1=",
    "2",
    "é",
    "🙂",
    "\t",
    "《",
    "》",
    " x",
    "a b",
]


@cache
def tokenizer(kind: str) -> Any:
    made = tokenizer_of(*TOKENIZERS[kind])
    if kind == "sentencepiece without a prefix":
        made.backend_tokenizer.normalizer = None
    return made


def text(draw: random.Random) -> str:
    while not (words := "".join(draw.choices(WORDS, k=draw.randint(1, 8)))).strip():
        pass
    return words


def conversation(draw: random.Random) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": text(draw)}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 4)):
        messages.append({"role": "user", "content": text(draw)})
        messages.append({"role": "assistant", "content": text(draw)})
    for message in messages:
        if message["role"] == "assistant" and draw.random() < 0.15:
            message["weight"] = draw.choice([0, 2])
    return messages


def weight(message: dict[str, Any]) -> int:
    return message.get("weight", 1) if message["role"] == "assistant" else 0


def asked(template: Template, messages: list[dict[str, Any]]) -> list[tuple[list[int], list[int], int]]:
    """(prompt, answer with stop token, weight) of every answer that is trained, as a server would have it."""
    speaks = template.tokenizer
    stop = speaks.convert_tokens_to_ids(template.stop)
    found = []
    for at, message in enumerate(messages):
        if not weight(message):
            continue
        before = [{"role": one["role"], "content": one["content"]} for one in messages[:at]]
        rendered = speaks.apply_chat_template(
            before, chat_template=template.source, tokenize=False, add_generation_prompt=True
        )
        prompt = speaks(rendered, add_special_tokens=False)["input_ids"]
        found.append((prompt, [*answer_ids(template, message), stop], weight(message)))
    return found


def answer_ids(template: Template, message: dict[str, Any]) -> list[int]:
    content = message["content"]
    if template.name == "qwen3":  # the published template writes empty thoughts before an answer without thoughts
        content = f"<think>\n\n</think>\n\n{content.lstrip(chr(10))}"
    if template.name in ("gemma", "llama3", "llama3.1"):  # as in the published templates, which trim texts
        content = content.strip()
    if template.name in ("mistral-v3", "mistral-tekken"):
        content = content.rstrip(" ")
    if template.name in ("mistral-v1", "mistral-v3", "vicuna") and not writes_a_space(template.tokenizer):
        content = f" {content}"
    return template.tokenizer(content, add_special_tokens=False)["input_ids"]


def writes_a_space(speaks: Any) -> bool:
    return str(speaks.tokenize("a")[0]).startswith("▁")


def stands_in(example: Example, prompt: list[int], answer: list[int], times: int) -> bool:
    start, end = len(prompt), len(prompt) + len(answer)
    return list(example.ids[:end]) == prompt + answer and set(example.learn[start:end]) == {times}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_answer_follows_the_exact_prompt_a_server_would_send(kind, name):
    # Catches a mask shifted by one, an answer tokenized together with its prompt, an earlier answer rendered
    # differently from what was trained, and a weight used for a neighbour.
    template = load_template(name, tokenizer(kind))
    draw = random.Random(f"{kind}{name}")
    chats = [conversation(draw) for _ in range(CONVERSATIONS)]
    ledger = Ledger()
    found = [RawRecord({"messages": chat}, f"chats.jsonl:{n}") for n, chat in enumerate(chats)]
    used = {
        examples[0].origin: examples
        for examples in encode(found, template, ledger, schema=Schema("messages"), max_tokens=100_000)
    }
    refused = {refusal.origin for refusal in ledger.records_refused}
    assert len(used) + len(refused) == CONVERSATIONS
    for n, chat in enumerate(chats):
        origin = f"chats.jsonl:{n}"
        if origin in refused:
            assert not any(map(weight, chat)), "all these templates can say any of the others"
            continue
        answers = asked(template, chat)
        for prompt, answer, times in answers:
            assert sum(stands_in(example, prompt, answer, times) for example in used[origin]) == 1
        learned = sum(sum(example.learn) for example in used[origin])
        assert learned == sum(len(answer) * times for _, answer, times in answers), "nothing else is learned"
        split = len(used[origin]) > 1
        assert split == (origin in ledger.split_origins)
        if not split:  # each answer continues the last, so one Example has them all, in order
            (example,) = used[origin]
            assert list(example.ids) == answers[-1][0] + answers[-1][1]
