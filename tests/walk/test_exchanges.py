"""Laws of exchanges beyond plain turns: thoughts, tool calls, texts, the targets of a conversation, what is cut."""

import json

import pytest

from atomtune.data.encoding.chat_template import CannotExpress, Template
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.example_table import as_examples, as_table
from atomtune.data.formats.schema import Schema
from atomtune.data.ledger import Ledger
from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import Record, Turn
from tests.reading import encode
from tests.tiny import CHATML, pieces, tokenizer_of

#: Like DeepSeek-R1: the prompt opens the thoughts, and earlier answers are shown without them.
THINKS_IN_THE_PROMPT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}{% else %}<|im_end|>"
    "{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "of a place", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def qwen() -> Template:
    return load_template("qwen3", tokenizer_of("bytes", CHATML))


@pytest.fixture(scope="module")
def chatml() -> Template:
    return load_template("chatml", tokenizer_of("bytes", CHATML))


def texts(template: Template, record: Record, at: int = -1) -> tuple[str, str]:
    prompt, answer = pieces(template, record, at)
    return prompt.text, answer.text


def encoded(template: Template, *values: dict, format: str = "messages", max_tokens: int = 10_000, **more):
    ledger = Ledger()
    found = [RawRecord(value, f"train.jsonl:{n}") for n, value in enumerate(values, 1)]
    return encode(found, template, ledger, schema=Schema(format), max_tokens=max_tokens, **more), ledger


def chat(*texts: str, **more) -> dict:
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)], **more}


def learned(template: Template, examples) -> list[str]:
    """The target spans of a record's examples, as text."""
    found = []
    for example in examples:
        run: list[int] = []
        for one, times in [*zip(example.ids, example.learn, strict=True), (0, 0)]:
            if times:
                run.append(one)
            elif run:
                found.append(template.tokenizer.decode(run))
                run = []
    return found


# --- thoughts and tools ---------------------------------------------------------------------------------------------


def test_reasoning_is_learned_where_the_template_writes_it(qwen):
    record = Record((Turn("user", "2+2?"), Turn("assistant", "4", reasoning="two and two")), "a:1")
    assert texts(qwen, record)[1] == "<think>\ntwo and two\n</think>\n\n4"


def test_an_earlier_answer_is_trained_as_if_it_were_the_last(qwen):
    # When it was written, the first answer had thoughts; in the history of later prompts it has none.
    turns = (
        Turn("user", "2+2?"),
        Turn("assistant", "4", reasoning="hm"),
        Turn("user", "And 3?"),
        Turn("assistant", "5"),
    )
    record = Record(turns, "a:1")
    assert texts(qwen, record, 1)[1] == "<think>\nhm\n</think>\n\n4"
    assert "hm" not in texts(qwen, record, 3)[0]
    value = chat("2+2?", "4", "And 3?", "5")
    value["messages"][1]["reasoning_content"] = "hm"
    ((first, second),), ledger = encoded(qwen, value)
    assert ledger.split_origins == ["train.jsonl:1"]
    stop = "<|im_end|>"
    assert learned(qwen, [first]) == [f"<think>\nhm\n</think>\n\n4{stop}"]
    assert learned(qwen, [second]) == [f"<think>\n\n</think>\n\n5{stop}"]


def test_an_answer_continues_the_think_block_that_the_prompt_opens():
    template = load_template("auto", tokenizer_of("bytes", THINKS_IN_THE_PROMPT))
    record = Record((Turn("user", "2+2?"), Turn("assistant", "4", reasoning="hm")), "a:1")
    assert texts(template, record) == ("<|im_start|>2+2?<|im_end|><think>\n", "hm\n</think>\n\n4")


def test_reasoning_that_a_template_leaves_out_is_reported(chatml):
    value = chat("2+2?", "4")
    value["messages"][1]["reasoning_content"] = "two and two"
    ((example,),), ledger = encoded(chatml, value)
    assert "two" not in chatml.tokenizer.decode(example.ids)
    assert any("reasoning" in notice for notice in ledger.notices)


def test_a_tool_call_is_learned_but_the_tool_result_is_not(qwen):
    value = chat("Rain?", tools=[WEATHER])
    value["messages"] += [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "weather", "arguments": json.dumps({"at": "灯塔"})}}],
        },
        {"role": "tool", "content": "fog", "name": "weather"},
        {"role": "assistant", "content": "Fog."},
    ]
    (examples,), ledger = encoded(qwen, value)
    assert not ledger.records_refused
    first, second = learned(qwen, examples)
    assert '<tool_call>\n{"name": "weather", "arguments": {"at": "灯塔"}}\n</tool_call>' in first
    assert second.endswith("Fog.<|im_end|>")
    assert "fog" not in "".join(learned(qwen, examples)), "what a tool answers is not learned"
    assert all('"name": "weather", "description"' in qwen.tokenizer.decode(example.ids) for example in examples)


@pytest.mark.parametrize("name", ["atom", "alpaca", "plain"])
def test_tools_that_a_template_cannot_express_are_refused_naming_the_template(name):
    template = load_template(name, tokenizer_of("sentencepiece"))
    calls = ({"name": "weather", "arguments": {}},)
    with pytest.raises(CannotExpress, match=f"{name}.*"):
        pieces(template, Record((Turn("user", "Rain?"), Turn("assistant", "", calls=calls)), "a:1"))
    with pytest.raises(CannotExpress, match=f"{name}.*tools"):
        pieces(template, Record((Turn("user", "Rain?"), Turn("assistant", "No.")), "a:1", tools=(WEATHER,)))


def test_a_control_token_string_in_the_prompt_does_not_change_the_answer(qwen):
    # Catches a prompt that is not recognized as the beginning of the text: the answer would lose its <think> block.
    hostile, peaceful = (Record((Turn("user", said), Turn("assistant", "4")), "a:1") for said in ("a<|im_end|>b", "ab"))
    assert texts(qwen, hostile)[1] == texts(qwen, peaceful)[1] == "<think>\n\n</think>\n\n4"
    calls = ({"name": "f", "arguments": {"a": 1}},)
    assert (
        "<tool_call>" in texts(qwen, Record((Turn("user", "<|im_end|>"), Turn("assistant", "", calls=calls)), "a:1"))[1]
    )


def test_a_control_token_string_in_a_tool_call_stays_text(qwen):
    turns = (Turn("user", "x"), Turn("assistant", "", calls=({"name": "f", "arguments": {"a": "<|im_end|>"}},)))
    piece = pieces(qwen, Record(turns, "a:1"))[1]
    assert "<|im_end|>" in piece.text and piece.breaks


# --- what is learned ------------------------------------------------------------------------------------------------


def test_learn_selects_all_answers_or_only_the_last(chatml):
    value = chat("a", "first", "b", "second")
    (both,), _ = encoded(chatml, value)
    (last,), _ = encoded(chatml, value, learn="last")
    assert learned(chatml, both) == ["first<|im_end|>", "second<|im_end|>"]
    assert learned(chatml, last) == ["second<|im_end|>"]
    assert [one.ids for one in both] == [one.ids for one in last], "on this tokenizer one sequence holds both"


def test_an_answer_of_weight_2_counts_twice_and_of_weight_0_not_at_all(chatml):
    value = chat("a", "first", "b", "second")
    value["messages"][1]["weight"] = 0
    value["messages"][3]["weight"] = 2
    ((example,),), ledger = encoded(chatml, value)
    assert learned(chatml, [example]) == ["second<|im_end|>"]
    assert set(example.learn) == {0, 2}
    assert ledger.target_tokens == sum(example.learn)


def test_a_text_record_is_learned_whole_with_a_final_stop_token(chatml):
    for kind, own in (("sentencepiece", None), ("bytes", CHATML)):
        template = load_template("auto", tokenizer_of(kind, own))
        ((example,),), ledger = encoded(template, {"text": "从前有一座山。"}, format="text")
        tokenizer = template.tokenizer
        ids = tokenizer("从前有一座山。", add_special_tokens=False)["input_ids"]
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        assert list(example.ids) == [*bos, *ids, tokenizer.convert_tokens_to_ids(template.stop)]
        assert list(example.learn) == [0] + [1] * (len(example.ids) - 1)
        assert (ledger.prompt_tokens, ledger.target_tokens) == (1, len(example.ids) - 1)


# --- too long -------------------------------------------------------------------------------------------------------


def test_only_answers_with_too_long_prompts_lose_the_oldest_turns(chatml):
    value = chat("first question", "one", "second question", "two", "third question", "three")
    (whole,), _ = encoded(chatml, value)
    room = len(whole[0].ids) - 1
    (examples,), ledger = encoded(chatml, value, max_tokens=room)
    assert learned(chatml, examples) == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"], "no answer is lost"
    kept, shortened = examples
    assert list(kept.ids) == list(whole[0].ids[: len(kept.ids)])
    assert "first question" not in chatml.tokenizer.decode(shortened.ids)
    assert ledger.cut_origins == ["train.jsonl:1"] and ledger.prompt_tokens_cut > 0
    assert max(len(one.ids) for one in examples) <= room


def test_a_refused_records_targets_are_counted(chatml):
    value = chat("a", "one", "b", "far too long an answer " * 20)
    records, ledger = encoded(chatml, value, chat("a", "one"), max_tokens=60)
    whole, _ = encoded(chatml, value)
    assert len(records) == 1
    assert "answer 2" in ledger.records_refused[0].reason
    assert ledger.target_tokens_refused == sum(sum(one.learn) for one in whole[0])


# --- kept together --------------------------------------------------------------------------------------------------


def test_all_examples_of_a_record_are_stored_in_one_row(qwen):
    records, _ = encoded(qwen, chat("a", "b", "c", "d"), chat("e", "f"))
    table = as_table(records)
    assert [as_examples(row) for row in table.to_pylist()] == records
    assert [len(examples) for examples in records] == [2, 1]
