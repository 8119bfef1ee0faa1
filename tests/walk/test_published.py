"""Records as other tools and published data sets write them are read with their meaning, or refused with a remedy."""

import json
import shlex

import pytest

from atomtune.data.formats.detect import detect_schema, to_record
from atomtune.data.formats.fields import DEEPEST
from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import ParsedRecord, Record, Refusal, Turn
from atomtune.errors import BadData

ORIGIN = "train.jsonl:1"
ASK, TELL = {"role": "user", "content": "几点"}, {"role": "assistant", "content": "九点"}
CALL = {"name": "get_time", "arguments": {}}


def read(value: dict, **named) -> ParsedRecord:
    return to_record(RawRecord(value, ORIGIN), detect_schema([value], name="train.jsonl", **named))


def turns(value: dict, **named) -> tuple[Turn, ...]:
    record, _ = read(value, **named)
    assert isinstance(record, Record), record
    return record.turns


def reason(value: dict, **named) -> str:
    refusal, _ = read(value, **named)
    assert isinstance(refusal, Refusal), refusal
    return refusal.reason


# --- roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("user", "assistant"), [("human", "gpt"), ("user", "assistant"), ("human", "model")])
def test_roles_may_be_mapped_to_the_role_names_of_any_format(user, assistant):
    # Catches a role that is mapped only once: the template dropped turns with the role "human".
    value = {"conversations": [{"from": "Human", "value": "早"}, {"from": "GPT", "value": "早上好"}]}
    assert turns(value, roles={"Human": user, "GPT": assistant}) == (Turn("user", "早"), Turn("assistant", "早上好"))


def test_roles_may_be_mapped_to_tool_calls_and_tool_results():
    value = {
        "messages": [
            ASK,
            {"role": "action", "content": json.dumps(CALL)},
            {"role": "result", "content": "9"},
            TELL,
        ]
    }
    read_turns = turns(value, roles={"action": "function_call", "result": "observation"})
    assert read_turns[1:3] == (Turn("assistant", "", calls=(CALL,)), Turn("tool", "9"))


def test_swifts_tool_call_and_tool_response_roles_are_read():
    call = {"role": "tool_call", "content": json.dumps(CALL)}
    answer = {"role": "tool_response", "content": '{"t": 9}'}
    assert turns({"messages": [ASK, call, answer, TELL]}) == (
        Turn("user", "几点"),
        Turn("assistant", "", calls=(CALL,)),
        Turn("tool", '{"t": 9}'),
        Turn("assistant", "九点"),
    )


def test_consecutive_tool_call_turns_are_merged_into_one_answer():
    # As in swift's records; no server writes two answers in a row.
    call = {"role": "tool_call", "content": json.dumps(CALL)}
    answer = {"role": "tool_response", "content": "9"}
    said = {"role": "assistant", "content": "我看看"}
    assert turns({"messages": [ASK, said, call, call, answer, answer, TELL]})[1:4] == (
        Turn("assistant", "我看看", calls=(CALL, CALL)),
        Turn("tool", "9"),
        Turn("tool", "9"),
    )


def test_the_role_mapping_suggested_in_an_error_is_accepted():
    value = {"messages": [ASK, {"role": "tool_cal", "content": json.dumps(CALL)}, TELL]}
    hint = reason(value).split("--roles ")[1]
    theirs, ours = hint.split("=")
    assert turns(value, roles={theirs: ours})[1].calls == (CALL,)


# --- keys -----------------------------------------------------------------------------------------------------------


HINTS = {
    # `context` is spelled like `text`, and the hint led users to train on the contexts.
    "Dolly": (
        {"instruction": "When?", "context": "In 1999 …", "response": "1999", "category": "closed_qa"},
        {"response": "output", "context": "input"},
    ),
    "Firefly": ({"kind": "NLI", "input": "q", "target": "a"}, {"input": "instruction", "target": "output"}),
    "COIG-PC": (
        {"instruction": "q", "inputs": "x", "targets": "a"},
        {"targets": "output", "inputs": "input"},
    ),
    "swift": (
        {"system": "s", "query": "q", "response": "a", "history": [["b", "c"]]},
        {"query": "instruction", "response": "output"},
    ),
    # `prompt` reads no history, which would be lost.
    "ChatGLM": (
        {"prompt": "q", "response": "a", "history": [["b", "c"]]},
        {"prompt": "instruction", "response": "output"},
    ),
    "AdGen": ({"content": "q", "summary": "a"}, {"content": "instruction", "summary": "output"}),
    "R1 distilled": (
        {"input": "q", "reasoning_content": "r", "content": "a", "score": 9},
        {"input": "instruction", "content": "output"},
    ),
    "medical-o1": (
        {"Question": "q", "Complex_CoT": "r", "Response": "a"},
        {"Question": "instruction", "Response": "output", "Complex_CoT": "reasoning_content"},
    ),
    "Chinese": ({"问题": "q", "回答": "a"}, {"问题": "instruction", "回答": "output"}),
    "input and output": ({"input": "q", "output": "a"}, {"input": "instruction"}),
    "UltraChat": ({"id": "0", "data": ["q", "a"]}, {"data": "conversations"}),
    # Neither an id nor a text is a list of turns, however similar the names are.
    "MOSS with plugins": ({"conversation_id": "7", "chat": {}}, {"YOURS": "output"}),
    "Glaive": ({"system": "s", "chat": "USER: q"}, {"YOURS": "output"}),
}


@pytest.mark.parametrize("name", HINTS)
def test_keys_of_published_datasets_get_correct_mapping_hints(name):
    value, expected = HINTS[name]
    with pytest.raises(BadData) as raised:
        detect_schema([value], name="train.jsonl")
    (hint,) = shlex.split(str(raised.value).rpartition("--keys ")[2].removesuffix("."))
    keys = dict(pair.split("=") for pair in hint.split(","))
    assert keys == expected
    if "YOURS" in keys:
        assert "YOURS=instruction,YOURS=output" in hint  # once, the second replaced the first
    else:
        assert turns(value, keys=keys)[-1].text in ("a", "1999")


def test_a_file_with_one_object_is_refused_naming_the_key_of_its_records():
    with pytest.raises(BadData, match='in the list under "data"'):
        detect_schema([{"version": "1", "data": [{"instruction": "q", "output": "a"}]}], name="train.json")


def test_a_cell_in_python_repr_form_is_refused_with_a_hint_to_use_json():
    # This is how pandas writes a column of lists into CSV.
    said = reason({"messages": str([ASK, TELL])}, format_choice="messages")
    assert "as Python prints it" in said and "json.dumps" in said


# --- exchanges and trees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {
            "system": "短",
            "conversation": [{"human": "几点", "assistant": "九点"}, {"human": "谢谢", "assistant": "不客气"}],
        },
        {
            "conversation": [
                {"system": "短", "input": "几点", "output": "九点"},
                {"system": "", "input": "谢谢", "output": "不客气"},
            ]
        },
        {"system": "短", "conversations": ["几点", "九点", "谢谢", "不客气"]},
    ],
    ids=["swift and MOSS", "XTuner", "LIMA"],
)
def test_exchange_objects_and_lists_of_texts_are_read_as_turns(value):
    assert turns(value) == (
        Turn("system", "短"),
        Turn("user", "几点"),
        Turn("assistant", "九点"),
        Turn("user", "谢谢"),
        Turn("assistant", "不客气"),
    )


def test_unused_keys_and_assumed_roles_of_exchanges_are_reported():
    _, notes = read({"conversations": [{"human": "几点", "assistant": "九点", "mood": "x"}]})
    assert notes == ('key "mood" of a turn is not used by this format',)
    _, notes = read({"conversations": ["几点", "九点"]})
    assert notes == ("conversations as a list of texts is read as questions and answers in turn",)


def test_a_single_message_of_an_openassistant_tree_is_refused():
    # Catches questions trained as answers, because each row of such a file has a `text`.
    row = {"message_id": "a", "parent_id": None, "role": "prompter", "text": "几点", "lang": "zh"}
    assert "one message of a tree" in reason(row)


def test_a_chosen_rejected_pair_of_dialogue_texts_is_read_as_turns():
    before = "\n\nHuman: 早\n\nAssistant: 早上好\n\nHuman: 几点\n\nAssistant: "
    value = {"chosen": f"{before}九点", "rejected": f"{before}滚"}
    assert turns(value) == (
        Turn("user", "早"),
        Turn("assistant", "早上好"),
        Turn("user", "几点"),
        Turn("assistant", "九点"),
    )


# --- answers of tools ------------------------------------------------------------------------------------------------


def test_anthropic_messages_are_read_with_their_tool_results():
    # Once the calls were read, but each record was refused for their answers: "only text can be trained on".
    schema = {"type": "object", "properties": {"zone": {"type": "string"}}}
    record, notes = read(
        {
            "tools": [{"name": "get_time", "description": "d", "input_schema": schema}],
            "messages": [
                ASK,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "看看钟", "signature": "x"},
                        {"type": "tool_use", "id": "t1", "name": "get_time", "input": {}},
                        {"type": "tool_use", "id": "t2", "name": "get_time", "input": {}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "9"}]},
                        {"type": "tool_result", "tool_use_id": "t2", "content": "10", "is_error": False},
                        {"type": "text", "text": "快"},
                    ],
                },
                TELL,
            ],
        }
    )
    assert isinstance(record, Record) and not notes
    calls = ({"id": "t1", **CALL}, {"id": "t2", **CALL})
    assert record.turns == (
        Turn("user", "几点"),
        Turn("assistant", "", reasoning="看看钟", calls=calls),
        Turn("tool", "9", call_id="t1"),
        Turn("tool", "10", call_id="t2"),
        Turn("user", "快"),
        Turn("assistant", "九点"),
    )
    function = {"name": "get_time", "description": "d", "parameters": schema}
    assert record.tools == ({"type": "function", "function": function},)


@pytest.mark.parametrize("value", [{"t": 9, "天": "晴"}, [{"title": "钟"}], [], 9, {"t": "\ud83d"}])
def test_a_tool_result_that_is_not_text_is_written_as_json(value):
    called = {"role": "assistant", "tool_calls": [{"function": CALL}]}
    record, notes = read({"messages": [ASK, called, {"role": "tool", "content": value}, TELL]})
    if "surrogate" in str(record):
        assert isinstance(record, Refusal) and value == {"t": "\ud83d"}
    elif value == []:
        assert record.turns[2].text == ""  # no part
    else:
        assert record.turns[2].text == json.dumps(value, ensure_ascii=False)
        assert notes == ("a tool result that is not a text is written as JSON",)
    assert "an object; expected text" in reason({"messages": [{"role": "user", "content": {"t": 9}}, TELL]})


# --- thoughts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asks_tells", [("instruction", "output"), ("prompt", "completion")])
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_records_reasoning_key_is_read_as_reasoning_of_its_only_answer(asks_tells, key):
    # Catches distilled data whose thoughts were dropped with only a notice.
    asks, tells = asks_tells
    record, notes = read({asks: "几点", tells: "九点", key: "看看钟", "id": None})
    assert isinstance(record, Record) and not notes
    assert record.turns == (Turn("user", "几点"), Turn("assistant", "九点", reasoning="看看钟"))
    assert reason({asks: "几点", tells: "九点", key: 3}) == f"the record's {key} is a number; expected text"


def test_a_mapped_reasoning_key_is_read_from_the_record_or_its_turns():
    assert (
        turns({"instruction": "q", "output": "a", "cot": "r"}, keys={"cot": "reasoning_content"})[-1].reasoning == "r"
    )
    value = {"messages": [ASK, {**TELL, "cot": "r"}]}
    assert turns(value, keys={"cot": "reasoning_content"})[-1].reasoning == "r"


@pytest.mark.parametrize("text", ["<think>\n看看钟\n\n等等，", "<think>\n看看钟\n</think>\n\n", "<think>\n\n</think>"])
def test_an_answer_cut_off_within_its_reasoning_is_refused(text):
    # As max_tokens leaves it. Catches a model that learns to stop in the middle of its thoughts.
    assert "it was cut off" in reason({"messages": [ASK, {**TELL, "content": text}]})
    assert "it was cut off" in reason({"instruction": "几点", "output": text})
    said = turns({"messages": [ASK, {**TELL, "content": text, "weight": 0}, ASK, TELL]})
    assert said[1].learn == 0, "what is only read may be anything"


def test_reasoning_given_twice_with_different_text_is_refused():
    # Catches an answer that was trained with two blocks of thoughts.
    twice = {**TELL, "content": "<think>\n看看钟\n</think>\n\n九点", "reasoning_content": "猜一个"}
    assert "gives its reasoning twice, and differently" in reason({"messages": [ASK, twice]})
    assert turns({"messages": [ASK, {**twice, "reasoning_content": "看看钟\n"}]})[-1].reasoning == "看看钟\n"


def test_reasoning_before_a_tool_call_is_not_taken_for_a_cut_off_answer():
    calls = {"role": "assistant", "content": "<think>\n看看钟\n</think>\n\n", "tool_calls": [{"function": CALL}]}
    assert turns({"messages": [ASK, calls, {"role": "tool", "content": "9"}, TELL]})[1].calls == (CALL,)


def test_stanford_alpaca_with_a_redundant_text_key_is_read_as_alpaca():
    text = "Below is an instruction …\n\n### Instruction:\n说早\n\n### Response:\n早上好"
    value = {"instruction": "说早", "input": "", "output": "早上好", "text": text}
    record, notes = read(value)
    assert record.turns == (Turn("user", "说早"), Turn("assistant", "早上好"))
    assert 'key "text" is not used by this format' in notes


def test_alpaca_with_an_unrelated_text_key_is_refused_as_ambiguous():
    with pytest.raises(BadData, match=r"fits alpaca .* and text"):
        detect_schema([{"instruction": "a", "output": "b", "text": "something else"}], name="x.jsonl")


# --- LLaMA-Factory v1 -----------------------------------------------------------------------------------------------


def part(type_name: str, value: object) -> dict:
    return {"type": type_name, "value": value}


def test_llama_factory_content_parts_are_read_from_their_value_key():
    value = {
        "messages": [
            {"role": "system", "content": [part("text", "简短")], "loss_weight": 0.0},
            {"role": "user", "content": [part("text", "几点")], "loss_weight": 0.0},
            {"role": "assistant", "content": [part("reasoning", "查"), part("tool_call", json.dumps(CALL))]},
            {"role": "tool", "content": [part("text", "9")], "loss_weight": 0.0},
            {"role": "assistant", "content": [part("text", "九点")], "loss_weight": 1.0},
        ]
    }
    assert turns(value) == (
        Turn("system", "简短"),
        Turn("user", "几点"),
        Turn("assistant", "", reasoning="查", calls=(CALL,)),
        Turn("tool", "9"),
        Turn("assistant", "九点"),
    )


def test_a_fractional_loss_weight_is_refused_with_a_remedy():
    # Rounding would silently drop the answer or double its weight.
    said = reason({"messages": [ASK, {**TELL, "loss_weight": 0.5}]})
    assert "messages 2's loss_weight is 0.5" in said and "multiply all of them" in said


# --- media ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["image", "images", "video", "videos", "audio", "audios"])
def test_a_record_with_media_is_refused(key):
    assert (
        reason({"messages": [ASK, TELL], key: ["cat.jpg"]}) == f'key "{key}" holds media; only text can be trained on'
    )
    assert turns({"messages": [ASK, TELL], key: []}), "an empty column of a table is none"


@pytest.mark.parametrize(
    "text", ["<image>这是什么？", "这是什么？<image>", "看\n<image>\n说", "<video>说", "<|image_pad|>?"]
)
def test_a_text_with_a_placeholder_of_media_is_refused(text):
    assert "stands for media" in reason({"messages": [{"role": "user", "content": text}, TELL]})
    assert "stands for media" in reason({"instruction": "看", "input": text, "output": "猫"})


@pytest.mark.parametrize("text", ["How do I use the <video> tag?", "Is <image> SVG?", "a <audio controls> b"])
def test_a_text_about_a_media_tag_is_not_refused(text):
    assert turns({"messages": [{"role": "user", "content": text}, TELL]})[0].text == text
    assert turns({"messages": [ASK, {"role": "assistant", "content": f"{text}\n<image>"}]}), "and so is an answer"


# --- cost and hostile words -----------------------------------------------------------------------------------------


def nested(levels: int, leaf: object = 1) -> object:
    for _ in range(levels):
        leaf = {"a": [leaf]}
    return leaf


@pytest.mark.parametrize("levels", [600, 100_000])
def test_too_deeply_nested_tools_and_calls_are_refused(levels):
    # json, Jinja and repr all raise RecursionError.
    tool = {"type": "function", "function": {"name": "f", "parameters": nested(levels)}}
    assert f"more than {DEEPEST} levels deep" in reason({"messages": [ASK, TELL], "tools": [tool]})
    call = {"function": {"name": "f", "arguments": nested(levels)}}
    assert f"more than {DEEPEST} levels deep" in reason(
        {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    )


def test_a_tool_schema_may_be_nested_up_to_the_limit():
    parameters = nested((DEEPEST - 2) // 2 - 1)
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    assert turns({"messages": [ASK, TELL], "tools": [tool]})


def test_control_characters_in_keys_and_roles_are_escaped_in_messages():
    key = "\x1b]0;PWNED\x07\x1b[2J\x1b[31mk"
    _, (note,) = read({"instruction": "q", "output": "a", key: "v"})
    missing = reason({"instruction": "q", key: "a"}, format_choice="alpaca")
    unknown = reason({"messages": [{"role": key, "content": "q"}, TELL]})
    with pytest.raises(BadData) as raised:
        detect_schema([{"instruction": "q", key: "a"}], name="x.jsonl")
    for message in (note, missing, unknown, str(raised.value).replace("\n", "")):
        assert message.isprintable() and r"\x1b]0;PWNED\x07" in message


def test_a_record_with_100_000_keys_gives_few_notes_and_a_short_error():
    wide = {f"k{n}": 1 for n in range(100_000)}
    _, notes = read({"instruction": "q", "output": "a", **wide})
    assert len(notes) == 20
    with pytest.raises(BadData) as raised:
        detect_schema([wide], name="x.jsonl")
    assert len(str(raised.value)) < 2000 and "and 99,980 more" in str(raised.value)
