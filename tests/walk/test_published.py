"""Records as other tools and published data sets write them: read as they mean, or refused with what to do."""

import json

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
def test_the_users_roles_may_be_given_in_any_formats_words(user, assistant):
    # Catches a mapping that is not mapped on: the template dropped the turns of a role "human".
    value = {"conversations": [{"from": "Human", "value": "早"}, {"from": "GPT", "value": "早上好"}]}
    assert turns(value, roles={"Human": user, "GPT": assistant}) == (Turn("user", "早"), Turn("assistant", "早上好"))


def test_the_users_roles_may_be_calls_and_a_tools_answers():
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


def test_tool_call_and_tool_response_are_roles_as_swift_publishes_them():
    call = {"role": "tool_call", "content": json.dumps(CALL)}
    answer = {"role": "tool_response", "content": '{"t": 9}'}
    assert turns({"messages": [ASK, call, answer, TELL]}) == (
        Turn("user", "几点"),
        Turn("assistant", "", calls=(CALL,)),
        Turn("tool", '{"t": 9}'),
        Turn("assistant", "九点"),
    )


def test_calls_in_turns_of_their_own_behind_each_other_are_one_answer():
    # As swift does; two answers in a row is what no server writes.
    call = {"role": "tool_call", "content": json.dumps(CALL)}
    answer = {"role": "tool_response", "content": "9"}
    said = {"role": "assistant", "content": "我看看"}
    assert turns({"messages": [ASK, said, call, call, answer, answer, TELL]})[1:4] == (
        Turn("assistant", "我看看", calls=(CALL, CALL)),
        Turn("tool", "9"),
        Turn("tool", "9"),
    )


def test_the_role_a_hint_names_is_one_that_can_be_passed():
    value = {"messages": [ASK, {"role": "tool_cal", "content": json.dumps(CALL)}, TELL]}
    hint = reason(value).split("--roles ")[1]
    theirs, ours = hint.split("=")
    assert turns(value, roles={theirs: ours})[1].calls == (CALL,)


# --- keys -----------------------------------------------------------------------------------------------------------


def test_dollys_keys_are_hinted_at_as_what_they_are():
    # `context` is spelled nearly like `text`: the hint led to learning the contexts.
    dolly = {"instruction": "When?", "context": "In 1999 …", "response": "1999", "category": "closed_qa"}
    with pytest.raises(BadData) as raised:
        detect_schema([dolly], name="dolly.jsonl")
    hint = str(raised.value).rpartition("--keys ")[2].removesuffix(".")
    keys = dict(pair.split("=") for pair in hint.split(","))
    assert keys == {"response": "output", "context": "input"}
    assert turns(dolly, keys=keys) == (Turn("user", "When?", "In 1999 …"), Turn("assistant", "1999"))


def test_stanford_alpaca_is_alpaca_though_all_of_it_stands_under_text_too():
    text = "Below is an instruction …\n\n### Instruction:\n说早\n\n### Response:\n早上好"
    value = {"instruction": "说早", "input": "", "output": "早上好", "text": text}
    record, notes = read(value)
    assert record.turns == (Turn("user", "说早"), Turn("assistant", "早上好"))
    assert 'key "text" is not used by this format' in notes


def test_a_text_that_is_another_than_the_answer_still_asks():
    with pytest.raises(BadData, match=r"fits alpaca .* and text"):
        detect_schema([{"instruction": "a", "output": "b", "text": "something else"}], name="x.jsonl")


# --- LLaMA-Factory v1 -----------------------------------------------------------------------------------------------


def part(type_name: str, value: object) -> dict:
    return {"type": type_name, "value": value}


def test_llama_factorys_parts_hold_their_text_under_value():
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


def test_a_fraction_of_a_weight_is_refused_with_the_way_out():
    # Rounding it would leave the answer out, or learn it twice as much, in silence.
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
def test_a_question_about_a_tag_is_a_question(text):
    assert turns({"messages": [{"role": "user", "content": text}, TELL]})[0].text == text
    assert turns({"messages": [ASK, {"role": "assistant", "content": f"{text}\n<image>"}]}), "and so is an answer"


# --- cost and hostile words -----------------------------------------------------------------------------------------


def nested(levels: int, leaf: object = 1) -> object:
    for _ in range(levels):
        leaf = {"a": [leaf]}
    return leaf


@pytest.mark.parametrize("levels", [600, 100_000])
def test_what_is_nested_without_end_is_refused(levels):
    # json, Jinja and repr all end in a RecursionError.
    tool = {"type": "function", "function": {"name": "f", "parameters": nested(levels)}}
    assert f"more than {DEEPEST} levels deep" in reason({"messages": [ASK, TELL], "tools": [tool]})
    call = {"function": {"name": "f", "arguments": nested(levels)}}
    assert f"more than {DEEPEST} levels deep" in reason(
        {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    )


def test_the_schema_of_a_tool_may_be_nested_as_deep_as_schemas_are():
    parameters = nested((DEEPEST - 2) // 2 - 1)
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    assert turns({"messages": [ASK, TELL], "tools": [tool]})


def test_control_characters_of_a_key_or_role_are_shown_not_sent_to_the_terminal():
    key = "\x1b]0;PWNED\x07\x1b[2J\x1b[31mk"
    _, (note,) = read({"instruction": "q", "output": "a", key: "v"})
    missing = reason({"instruction": "q", key: "a"}, format_choice="alpaca")
    unknown = reason({"messages": [{"role": key, "content": "q"}, TELL]})
    with pytest.raises(BadData) as raised:
        detect_schema([{"instruction": "q", key: "a"}], name="x.jsonl")
    for message in (note, missing, unknown, str(raised.value).replace("\n", "")):
        assert message.isprintable() and r"\x1b]0;PWNED\x07" in message


def test_a_record_of_a_hundred_thousand_keys_costs_and_says_little():
    wide = {f"k{n}": 1 for n in range(100_000)}
    _, notes = read({"instruction": "q", "output": "a", **wide})
    assert len(notes) == 20
    with pytest.raises(BadData) as raised:
        detect_schema([wide], name="x.jsonl")
    assert len(str(raised.value)) < 2000 and "and 99,980 more" in str(raised.value)
