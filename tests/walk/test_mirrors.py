"""Equal conversations become equal Records, in whatever format they are written.

The oracle is one simple writer per format, which gets plain pairs of texts; comments say what a format cannot express.
The same law is checked for the whole way through a file and detect_schema.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atomtune.data.formats.detect import detect_schema, to_record
from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import Record, Turn
from tests.conftest import write_jsonl
from tests.reading import read_values


class Chat(NamedTuple):
    """A conversation in which every answer is trained."""

    system: str
    exchanges: list[tuple[str, str]]

    @property
    def turns(self) -> tuple[Turn, ...]:
        first = [Turn("system", self.system)] if self.system else []
        rest = [turn for ask, tell in self.exchanges for turn in (Turn("user", ask), Turn("assistant", tell))]
        return (*first, *rest)


CHATS = [
    Chat("", [("你是谁？", "我是灯塔的看守人。")]),
    Chat("Be brief.", [("Who are you?", "I keep the light.")]),
    Chat("", [("1+1=?", "2"), ("And 2+2?", "4"), ("再加一呢？", "五。\n🙂")]),
    Chat("你住在岛上。", [("早", "早上好。"), ("说说天气。", "有雾，\n看不见对岸。")]),
    Chat("", [(" leading", "trailing \n\n"), ("\ttab, \"quotes\", 'both'; commas", "  code:\n    x = 1\n")]),
    Chat("{}", [("null", "[]"), ("true", "0")]),
]


def alpaca(chat: Chat) -> dict[str, Any]:
    *history, (ask, tell) = chat.exchanges
    return {"instruction": ask, "output": tell, "system": chat.system, "history": [list(pair) for pair in history]}


def alpaca_by_input(chat: Chat) -> dict[str, Any]:
    """Like `alpaca`, but the last question is an input without instruction: Turn.input, which no other format has."""
    written = alpaca(chat)
    return {**written, "instruction": "", "input": written["instruction"]}


def alpaca_cells(chat: Chat) -> dict[str, str]:
    """As in a table, where every cell is a text."""
    written = alpaca(chat)
    return {**written, "input": "", "history": json.dumps(written["history"])}


def messages(chat: Chat) -> dict[str, Any]:
    return {"messages": [{"role": turn.role, "content": turn.text} for turn in chat.turns]}


def messages_in_parts(chat: Chat) -> dict[str, Any]:
    """Every text in two parts, and all keys of OpenAI's answers with the value null."""
    return {
        "messages": [
            {
                "role": {"system": "developer"}.get(turn.role, turn.role),
                "content": [{"type": "text", "text": turn.text[:2]}, {"type": "text", "text": turn.text[2:]}],
                **dict.fromkeys(("name", "tool_calls", "refusal", "reasoning_content", "weight")),
            }
            for turn in chat.turns
        ],
        "tools": [],
    }


def messages_cell(chat: Chat) -> dict[str, str]:
    return {"messages": json.dumps(messages(chat)["messages"], ensure_ascii=False)}


def sharegpt(chat: Chat) -> dict[str, Any]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[turn.role], "value": turn.text} for turn in chat.turns]}


def sharegpt_with_system(chat: Chat) -> dict[str, Any]:
    turns = sharegpt(Chat("", chat.exchanges))["conversations"]
    return {"conversation": turns, "system": chat.system, "tools": ""}


def prompt(chat: Chat) -> dict[str, Any]:
    said = messages(chat)["messages"]
    return {"prompt": said[:-1], "completion": said[-1:]}


def prompt_text(chat: Chat) -> dict[str, Any]:
    """A text prompt can be only one question: no system text, one exchange."""
    ((ask, tell),) = chat.exchanges
    return {"prompt": ask, "completion": tell}


def chatml(chat: Chat) -> dict[str, Any]:
    return {"text": "".join(f"<|im_start|>{turn.role}\n{turn.text}<|im_end|>\n" for turn in chat.turns)}


def own_names(chat: Chat) -> dict[str, Any]:
    """The user's own names, declared by --keys and --roles."""
    names = {"system": "scene", "user": "she", "assistant": "bot"}
    return {"talk": [{"speaker": names[turn.role], "words": turn.text} for turn in chat.turns]}


NAMED: dict[str, Any] = {
    "keys": {"talk": "conversations", "speaker": "from", "words": "value"},
    "roles": {"scene": "system", "she": "user", "bot": "assistant"},
}
WRITERS: list[Callable[[Chat], dict[str, Any]]] = [
    *(alpaca, alpaca_cells, messages, messages_in_parts, messages_cell, sharegpt, sharegpt_with_system, prompt, chatml)
]


def read(values: list[dict[str, Any]], **named: Any) -> list[tuple[Turn, ...]]:
    schema = detect_schema(values, name="train.jsonl", **named)
    made = [to_record(RawRecord(value, f"train.jsonl:{n}"), schema).outcome for n, value in enumerate(values)]
    assert all(isinstance(one, Record) for one in made), made
    return [one.turns for one in made if isinstance(one, Record)]


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_a_conversation_is_the_same_record_in_every_format(writer):
    assert read([writer(chat) for chat in CHATS]) == [chat.turns for chat in CHATS]


def test_a_conversation_is_the_same_record_under_the_users_own_names():
    assert read([own_names(chat) for chat in CHATS], **NAMED) == [chat.turns for chat in CHATS]


def test_a_text_prompt_and_completion_are_read_as_one_exchange():
    single = [chat for chat in CHATS if len(chat.exchanges) == 1 and not chat.system]
    assert single
    assert read([prompt_text(chat) for chat in single]) == [chat.turns for chat in single]


def test_an_alpaca_input_without_instruction_is_read_as_the_question():
    def folded(turn: Turn) -> Turn:
        return Turn(turn.role, turn.text + turn.input)

    turns = read([alpaca_by_input(chat) for chat in CHATS])
    assert [tuple(map(folded, one)) for one in turns] == [chat.turns for chat in CHATS]


def test_message_weights_are_read_the_same_under_each_key_name():
    said = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}] * 2
    plain = [Turn("user", "Q?"), Turn("assistant", "A.", learn=0), Turn("user", "Q?"), Turn("assistant", "A.")]
    for key in ("weight", "loss_weight", "train"):
        weighed = [{**one, key: 0} if n == 1 else one for n, one in enumerate(said)]
        assert read([{"messages": weighed}]) == read([{"conversations": weighed}]) == [tuple(plain)]


def test_tool_calls_are_the_same_record_in_sharegpt_and_messages():
    # ShareGPT cannot name the tool that answers, or the call.
    call, tool = {"name": "add", "arguments": {"a": 1, "b": 2}}, {"name": "add", "parameters": {"type": "object"}}
    theirs = {
        "conversations": [
            {"from": "human", "value": "1+2?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "Three."},
        ],
        "tools": json.dumps([tool]),
    }
    openai = {
        "messages": [
            {"role": "user", "content": "1+2?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}}],
            },
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "Three."},
        ],
        "tools": [{"type": "function", "function": tool}],
    }
    records = [
        to_record(RawRecord(value, "one:1"), detect_schema([value], name="one")).outcome for value in (theirs, openai)
    ]
    assert isinstance(records[0], Record) and records[0] == records[1]


def csv_of(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_a_conversation_is_the_same_record_out_of_every_kind_of_file(tmp_path):
    files = [
        write_jsonl(tmp_path / "alpaca.jsonl", [alpaca(chat) for chat in CHATS]),
        csv_of(tmp_path / "alpaca.csv", [alpaca_cells(chat) for chat in CHATS]),
        csv_of(tmp_path / "messages.csv", [messages_cell(chat) for chat in CHATS]),
        csv_of(tmp_path / "text.csv", [chatml(chat) for chat in CHATS]),
        parquet_of(tmp_path / "alpaca.parquet", [alpaca(chat) for chat in CHATS]),
        parquet_of(tmp_path / "messages.parquet", [messages_in_parts(chat) for chat in CHATS]),
        parquet_of(tmp_path / "sharegpt.parquet", [sharegpt_with_system(chat) for chat in CHATS]),
        parquet_of(tmp_path / "prompt.parquet", [prompt(chat) for chat in CHATS]),
    ]
    for file in files:
        found = [one for one in read_values(file) if isinstance(one, RawRecord)]
        assert read([one.value for one in found]) == [chat.turns for chat in CHATS], file.name


# No control strings, which a rendered text cannot contain as text; no opened thoughts ([THINK]), which are refused as
# cut off; no surrogates, which no file can contain.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>["), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip()) and text == text.strip()
)
SPOKEN = st.builds(Chat, st.just("") | TEXTS, st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
@settings(max_examples=60, deadline=None)
@given(chats=st.lists(SPOKEN, min_size=1, max_size=4))
def test_any_conversation_is_the_same_record_in_every_format(writer, chats):
    assert read([writer(chat) for chat in chats]) == [chat.turns for chat in chats]
