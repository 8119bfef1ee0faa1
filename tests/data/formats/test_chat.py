"""Laws of the chat formats: ShareGPT, OpenAI's messages, prompt and completion, text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atomtune.data.formats.detect import to_record
from atomtune.data.formats.schema import RECORD_KEYS, ROLES, SIGNS, TURN_KEYS, Schema
from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import ParsedRecord, Record, Refusal, Turn
from tests.conftest import shell_words

ORIGIN = "train.jsonl:17"
ASK = {"role": "user", "content": "Q?"}
TELL = {"role": "assistant", "content": "A."}
CALL = {"name": "weather", "arguments": {"city": "苏州"}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "…", "parameters": {"type": "object"}}}


def read(value: object, schema: Schema) -> ParsedRecord:
    return to_record(RawRecord(value, ORIGIN), schema)


def chat(*messages: object, **beside: object) -> Record:
    record, _ = read({"messages": list(messages), **beside}, Schema("messages"))
    assert isinstance(record, Record), record
    return record


def shared(*turns: object, **beside: object) -> Record:
    record, _ = read({"conversations": list(turns), **beside}, Schema("sharegpt"))
    assert isinstance(record, Record), record
    return record


def reason(value: object, schema: Schema) -> str:
    refusal, notes = read(value, schema)
    assert isinstance(refusal, Refusal), refusal
    assert refusal.origin == ORIGIN
    assert not notes, "what is refused is not accepted with a notice too"
    refusal.reason.encode()
    return refusal.reason


def why_not(*messages: object, **beside: object) -> str:
    return reason({"messages": list(messages), **beside}, Schema("messages"))


# --- roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["gpt", "assistant", "chatgpt", "bing", "bard", "model"])
@pytest.mark.parametrize("asked", ["human", "user"])
def test_sharegpt_role_aliases_are_accepted(asked, said):
    record = shared({"from": asked, "value": "Q?"}, {"from": said, "value": "A."})
    assert record.turns == (Turn("user", "Q?"), Turn("assistant", "A."))


@pytest.mark.parametrize(
    ("theirs", "ours"), [("developer", "system"), ("system", "system"), ("function", "tool"), ("tool", "tool")]
)
def test_openai_role_aliases_for_system_and_tool_are_accepted(theirs, ours):
    assert chat({"role": theirs, "content": "x"}, ASK, TELL).turns[0] == Turn(ours, "x")


def test_an_unknown_role_error_names_the_turn_and_the_roles_option():
    said = why_not(ASK, {"role": "bot", "content": "A."})
    assert 'turn 2 says role "bot"; expected system, user, assistant or tool' in said
    assert "--roles bot=assistant" in said


def test_a_misspelt_role_gets_a_suggestion():
    assert "--roles User=user" in why_not({"role": "User", "content": "Q?"}, TELL)


def test_the_suggested_role_of_someone_who_asks_is_user():
    # Answers were once suggested for every unknown name, so the questions would have been learned.
    assert "--roles narrator=user" in why_not({"role": "narrator", "content": "Q?"}, TELL)
    assert "--roles '用户=user'" in why_not(
        {"role": "system", "content": "S."}, {"role": "用户", "content": "Q?"}, TELL
    )


@pytest.mark.parametrize("role", ["the user", "user; touch x", "$(touch x)"])
def test_a_suggested_role_is_one_word_for_a_shell(role):
    hint = why_not({"role": role, "content": "Q?"}, TELL).rpartition("--roles ")[2]
    assert shell_words(hint) in ([f"{role}=user"], [f"{role}=assistant"])


def test_user_defined_roles_override_built_in_ones():
    schema = Schema("messages", roles={"bot": "assistant", "model": "user"})
    record, _ = read({"messages": [{"role": "model", "content": "Q?"}, {"role": "bot", "content": "A."}]}, schema)
    assert record.turns == (Turn("user", "Q?"), Turn("assistant", "A."))


def test_a_system_turn_keeps_its_place():
    late = {"role": "system", "content": "Now in verse."}
    assert [turn.role for turn in chat(ASK, TELL, late, ASK, TELL).turns][2] == "system"


def test_consecutive_turns_of_one_role_are_not_merged():
    assert [turn.text for turn in chat(ASK, {"role": "user", "content": "Well?"}, TELL).turns] == ["Q?", "Well?", "A."]


# --- what is learned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train", "training", "loss"])
@pytest.mark.parametrize(("weight", "times"), [(0, 0), (1, 1), (3, 3), (False, 0), (True, 1), (2.0, 2), (None, 1)])
def test_an_answer_is_learned_as_often_as_its_weight_says(key, weight, times):
    # null is what a table writes for a row without a value.
    record = chat(ASK, {**TELL, key: weight}, ASK, TELL)
    assert [turn.learn for turn in record.turns if turn.role == "assistant"] == [times, 1]


@pytest.mark.parametrize("weight", [0.5, -1, 128, "1", [1], 1e300, 10**400])
def test_a_weight_that_is_not_a_valid_count_is_refused(weight):
    # Catches int(0.5), which would drop the answer silently, and 128, which the store cannot hold.
    assert "messages 2's weight is" in why_not(ASK, {**TELL, "weight": weight})


def test_weights_that_contradict_each_other_are_refused():
    assert "weight 1 and train 0" in why_not(ASK, {**TELL, "weight": 1, "train": False})


@pytest.mark.parametrize("weight", [0, False])
def test_a_zero_weight_on_a_user_turn_is_accepted(weight):
    assert chat({**ASK, "weight": weight}, TELL).turns[0] == Turn("user", "Q?")


def test_a_positive_weight_on_a_user_turn_is_refused():
    said = why_not({**ASK, "weight": 1}, TELL)
    assert "messages 1 (user) has a weight" in said and "assistant" in said


def test_a_record_whose_answers_all_have_zero_weight_is_refused():
    assert "weight 0 on every answer" in why_not(ASK, {**TELL, "weight": 0})


def test_turns_after_the_last_answer_are_left_out_with_a_notice():
    record, notes = read({"messages": [ASK, TELL, ASK, ASK]}, Schema("messages"))
    assert len(record.turns) == 2
    assert notes == ("turns after the last answer are left out",)


@pytest.mark.parametrize(("name", "is_noted"), [("weather", False), ("Weather", True)])
def test_a_call_of_a_tool_that_the_record_does_not_list_is_noted(name, is_noted):
    calls = {"role": "assistant", "tool_calls": [{"type": "function", "function": {**CALL, "name": name}}]}
    _, notes = read({"messages": [ASK, calls], "tools": [TOOL]}, Schema("messages"))
    assert notes == (("an answer calls a tool that the record does not list",) if is_noted else ())
    _, without_a_list = read({"messages": [ASK, calls]}, Schema("messages"))
    assert without_a_list == ()


@pytest.mark.parametrize("messages", [[ASK], [{"role": "system", "content": "x"}, ASK]])
def test_a_record_without_an_answer_is_refused(messages):
    assert "nothing to learn" in why_not(*messages)


@pytest.mark.parametrize("nothing", ["", " \n", [], [{"type": "text", "text": ""}]])
def test_an_empty_answer_is_refused_with_its_position(nothing):
    said = why_not({"role": "system", "content": "x"}, ASK, {"role": "assistant", "content": nothing})
    assert said == "messages 3 (assistant) is empty: there is nothing to learn"


def test_an_empty_question_is_refused_with_its_position():
    assert "conversations 1 (user) is empty" in reason(
        {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "A."}]}, Schema("sharegpt")
    )


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_system_and_tool_turns_are_kept(text):
    # An empty system text switches off a template's default persona, in a server too.
    record = chat({"role": "system", "content": text}, ASK, {"role": "tool", "content": ""}, TELL)
    assert record.turns == (Turn("system", text), Turn("user", "Q?"), Turn("tool", ""), Turn("assistant", "A."))


# --- contents -------------------------------------------------------------------------------------------------------


def test_text_parts_are_joined_and_reasoning_and_calls_kept_separate():
    parts = [
        {"type": "thinking", "thinking": "Hm."},
        {"type": "text", "text": "Let me "},
        {"type": "text", "text": "see."},
        {"type": "tool_use", "id": "7", "name": "weather", "input": {"city": "苏州"}},
    ]
    answer = chat(ASK, {"role": "assistant", "content": parts}).turns[-1]
    assert answer == Turn("assistant", "Let me see.", reasoning="Hm.", calls=({"id": "7", **CALL},))


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "thinking", "tool_use"])
def test_a_non_text_content_part_is_refused_by_its_type(kind):
    said = why_not({"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": kind, kind: {}}]}, TELL)
    assert said == f'messages 1\'s content holds a part of type "{kind}"; only text can be trained on'


def test_a_message_with_media_beside_its_text_is_refused():
    assert 'messages 1 has media under "images"' in why_not({**ASK, "images": ["cat.png"]}, TELL)
    assert chat({**ASK, "images": []}, {**TELL, "audio": None}) == chat(ASK, TELL)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_beside_the_answer(key):
    assert chat(ASK, {**TELL, key: "Hm."}).turns[-1] == Turn("assistant", "A.", reasoning="Hm.")


def test_duplicate_reasoning_is_merged_and_differing_reasoning_refused():
    both = {"reasoning": "Hm.", "reasoning_content": "Hm."}  # vLLM's answers have both keys
    assert chat(ASK, {**TELL, **both}).turns[-1].reasoning == "Hm."
    assert "reasoning twice" in why_not(ASK, {**TELL, **both, "reasoning": "Oh."})


@pytest.mark.parametrize("arguments", [CALL["arguments"], json.dumps(CALL["arguments"])])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_tool_calls_need_no_text_and_their_arguments_become_an_object(arguments, content):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    record = chat(
        ASK,
        {"role": "assistant", **content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "28°"},
        TELL,
        tools=[TOOL],
    )
    assert record.turns[1:3] == (
        Turn("assistant", "", calls=({"id": "call_1", **CALL},)),
        Turn("tool", "28°", name="weather", call_id="call_1"),
    )
    assert record.tools == (TOOL,)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), json.dumps([TOOL["function"]]), [TOOL["function"]]])
def test_tool_definitions_of_every_shape_are_normalized(tools):
    assert chat(ASK, TELL, tools=tools).tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, "", "[]", [], " "])
def test_an_empty_tools_value_means_no_tools(tools):
    assert chat(ASK, TELL, tools=tools).tools == ()


@pytest.mark.parametrize(
    ("tools", "why"),
    [("{", "tools is not JSON"), ([{}], "tools 1 has no name"), ([3], "tools 1 is a number"), (3, "tools is a number")],
)
def test_tools_that_cannot_be_read_are_refused(tools, why):
    assert why in why_not(ASK, TELL, tools=tools)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ({"function": {"arguments": "{}"}}, "has no name"),
        ({"function": {"name": "f", "arguments": "[1]"}}, "arguments are a list"),
        ({"function": {"name": "f", "arguments": "{1}"}}, "arguments is not JSON"),
        ("f()", "tool_calls is text"),
        ({"function": {"name": "f", "arguments": {"a": "\ud83d"}}}, "half a surrogate pair"),
        ({"function": {"name": "f", "arguments": {"a": float("nan")}}}, "not JSON"),  # a table may contain it
        ({"function": {"name": "f", "arguments": {"a": b"x"}}}, "not JSON"),
        ({"function": {"name": "f", "arguments": "[" * 100_000}}, "nested too deeply"),
    ],
)
def test_a_call_that_cannot_be_read_is_refused(call, why):
    assert why in why_not(ASK, {"role": "assistant", "content": None, "tool_calls": [call]})


@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args"])  # OpenAI, Llama 3.1, Anthropic, Gemini
@pytest.mark.parametrize("filled", [{}, {"arguments": None}])  # Arrow adds a null for a key of other calls
def test_the_arguments_of_a_call_are_read_under_the_keys_of_other_formats(key, filled):
    call = {"name": "weather", **filled, key: CALL["arguments"]}
    assert chat(ASK, {"role": "assistant", "tool_calls": [call]}).turns[-1].calls == (CALL,)
    in_text = shared({"from": "human", "value": "Q?"}, {"from": "function_call", "value": json.dumps(call)})
    assert in_text.turns[-1].calls == (CALL,)
    part = {"type": "tool_use", **call}
    assert chat(ASK, {"role": "assistant", "content": [part]}).turns[-1].calls == (CALL,)


def test_a_call_with_thoughts_of_its_own_keeps_them():
    call = {"role": "tool_call", "content": json.dumps(CALL), "reasoning_content": "It may rain."}
    record = chat(ASK, TELL, call)
    assert record.turns[1:] == (Turn("assistant", "A."), Turn("assistant", "", reasoning="It may rain.", calls=(CALL,)))


def test_a_call_with_another_weight_than_the_answer_before_it_is_an_answer_of_its_own():
    # As a part of that answer it would not be learned.
    call = {"role": "tool_call", "content": json.dumps(CALL)}
    record = chat(ASK, {**TELL, "weight": 0}, call)
    assert record.turns[1:] == (Turn("assistant", "A.", learn=0), Turn("assistant", "", calls=(CALL,)))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "function", "function": CALL},
        {"type": "tool_call", "function": CALL},
        {"type": "tool_call", "tool_call": {**CALL, "arguments": json.dumps(CALL["arguments"])}},
        {"type": "function_call", **CALL},
        {"type": "tool_call", "value": json.dumps(CALL)},
    ],
)
def test_a_call_as_a_part_of_an_answer_is_read_in_each_form(part):
    assert chat(ASK, {"role": "assistant", "content": ["A.", part]}).turns[-1] == Turn("assistant", "A.", calls=(CALL,))


def test_a_tool_result_inside_an_answer_is_refused_not_moved_before_it():
    parts = [
        *({"type": "tool_use", "id": "1", **CALL}, {"type": "tool_result", "tool_use_id": "1", "content": "28°"}),
        {"type": "text", "text": "Warm."},
    ]
    assert '"tool_result"' in why_not(ASK, {"role": "assistant", "content": parts})


def test_sharegpt_function_call_turns_become_tool_calls():
    record = shared(
        {"from": "human", "value": "Warm?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "28°"},
        {"from": "gpt", "value": "Yes."},
        system="Be brief.",
        tools=json.dumps([TOOL["function"]]),
    )
    assert record.turns == (
        *(Turn("system", "Be brief."), Turn("user", "Warm?"), Turn("assistant", "", calls=(CALL,))),
        *(Turn("tool", "28°"), Turn("assistant", "Yes.")),
    )
    assert record.tools == (TOOL,)


def test_null_keys_of_messages_from_a_table_are_ignored():
    # Parquet gives every message all keys.
    empty = {"role": None, "content": None, "name": None, "tool_calls": None, "weight": None, "reasoning": None}
    assert chat({**empty, **ASK}, {**empty, **TELL}) == chat(ASK, TELL)


def test_messages_may_be_json_text_in_a_table_cell():
    record, _ = read({"messages": json.dumps([ASK, TELL]), "tools": ""}, Schema("messages"))
    assert record == chat(ASK, TELL)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "holds no turn"),
        ("x", "messages is not JSON"),
        (None, "messages is null"),
        ({"role": "user"}, "an object"),
        ([7], "messages 1 is a number; expected an object"),
        (['{"role": "user"}'], "messages 1 is text; expected an object"),
        ([{"role": "assistant", "content": "x"}], "there is nothing before the only answer"),
        ([{"content": "x"}], 'messages 1 has no key "role"; keys here: content'),
        ([{"role": "user"}], 'messages 1 has no key "content"; keys here: role'),
        ([{"from": "human"}], 'messages 1 has no key "value"; keys here: from'),
        ([{"role": "user", "content": None}], "messages 1's content is null"),
        ([{"from": "human", "value": 3}], "messages 1's value is a number"),
        ([{"role": ["user"], "content": "x"}], "messages 1's role is a list"),
        ([{"role": "user", "content": "\ud83d"}], "messages 1's content holds half a surrogate pair at character 1"),
    ],
)
def test_an_invalid_conversation_is_refused_with_the_position(messages, why):
    assert why in reason({"messages": messages}, Schema("messages"))


def test_unreadable_content_is_not_also_reported_as_empty():
    assert why_not({"role": "user", "content": 3}, TELL) == "messages 1's content is a number; expected text"


def test_all_problems_are_reported_at_once_without_repeating_the_text():
    said = why_not({"role": "bot", "content": "secret"}, {"role": "user", "content": 3}, {**TELL, "weight": 0.5})
    assert all(part in said for part in ('turn 1 says role "bot"', "messages 2's content", "messages 3's weight"))
    assert "secret" not in said


def test_unused_keys_are_reported_once_per_record():
    _, notes = read({"id": 7, "messages": [ASK, {**TELL, "mood": "x"}, ASK, {**TELL, "mood": "y"}]}, Schema("messages"))
    assert sorted(notes) == ['key "id" is not used by this format', 'key "mood" of a turn is not used by this format']


def test_a_top_level_system_text_must_not_contradict_the_system_turn():
    first = {"role": "system", "content": "x"}
    assert chat(first, ASK, TELL, system="x") == chat(first, ASK, TELL) == chat(ASK, TELL, system="x")
    assert "differ" in why_not(first, ASK, TELL, system="y")


# --- prompt and completion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Q?", [ASK]])
@pytest.mark.parametrize("completion", ["A.", [TELL]])
def test_prompt_and_completion_are_texts_or_messages(prompt, completion):
    record, notes = read({"prompt": prompt, "completion": completion}, Schema("prompt"))
    assert record.turns == (Turn("user", "Q?"), Turn("assistant", "A."))
    assert not notes


@pytest.mark.parametrize("key", ["completion", "chosen"])
def test_a_list_of_texts_as_a_completion_is_refused_as_its_first_text_is_no_question(key):
    value = {"prompt": "Q?", key: ["A.", "Or B."], "rejected": "C."}
    assert "completion is a list of texts; expected one text or a list of messages" in reason(value, Schema("prompt"))


@pytest.mark.parametrize("text", [json.dumps([TELL]), str([TELL])])
def test_a_completion_that_is_a_list_of_messages_as_text_is_learned_as_text_with_a_notice(text):
    # The cell of a table, or a task whose answers are conversations: only the user knows.
    record, notes = read({"prompt": "Q?", "completion": text}, Schema("prompt"))
    assert record.answer == text
    assert notes == ('"completion" is a list of messages written as text, and is learned as that text',)


@pytest.mark.parametrize("completion", ["A.", [TELL]])
def test_a_prompt_has_its_system_text_tools_and_variables(completion):
    value = {"prompt": "Q?", "completion": completion, "system": "S", "tools": [TOOL], "enable_thinking": False}
    record, notes = read(value, Schema("prompt"))
    assert isinstance(record, Record)
    assert record.turns == (Turn("system", "S"), Turn("user", "Q?"), Turn("assistant", "A."))
    assert record.tools == (TOOL,)
    assert record.variables == {"enable_thinking": False}
    assert not notes
    _, notes = read({"prompt": "Q?", "completion": completion, "source": "wiki"}, Schema("prompt"))
    assert notes == ('key "source" is not used by this format',)


def test_answers_in_a_prompt_are_learned_with_a_notice():
    record, notes = read({"prompt": [ASK, TELL, ASK], "completion": "A."}, Schema("prompt"))
    assert record.learned == (1, 3)
    assert any('"prompt" are learned' in notice for notice in notes)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"prompt": "Q?"}, 'no key "completion"; keys here: prompt'),
        ({"prompt": "", "completion": "A."}, "prompt is empty"),
        ({"prompt": "Q?", "completion": " "}, "completion is empty: there is nothing to learn"),
        ({"prompt": [ASK, TELL], "completion": [ASK]}, "completion has no assistant turn"),
        ({"prompt": 3, "completion": None}, "prompt is a number; expected text; completion is null; expected text"),
        ({"prompt": "Q?", "completion": "A.", "label": False}, "not wanted"),
        ({"chosen": "A.", "rejected": "B."}, "preference data (chosen, rejected) without a prompt"),
    ],
)
def test_an_invalid_prompt_completion_record_is_refused(value, why):
    assert why in reason(value, Schema("prompt"))


# --- text -----------------------------------------------------------------------------------------------------------


def test_a_text_of_no_known_template_is_learned_in_full_with_a_notice():
    record, notes = read({"text": "Once upon a time …\n"}, Schema("text"))
    assert record.turns == (Turn("text", "Once upon a time …\n"),)
    assert notes == ("a text that no known template has written is learned in full",)


def test_a_rendered_text_is_split_into_turns_and_its_template_named():
    record, notes = read({"text": "<s>Human: Q?\n</s><s>Assistant: A.\n</s>"}, Schema("text"))
    assert [(turn.role, turn.text.strip()) for turn in record.turns] == [("user", "Q?"), ("assistant", "A.")]
    assert any("atom" in notice for notice in notes)


def test_an_empty_answer_in_a_rendered_text_is_refused_with_its_turn():
    exchange = "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    assert reason({"text": exchange.format("") + exchange.format("A.")}, Schema("text")) == (
        "turn 2 of text (assistant) is empty: there is nothing to learn"
    )


@pytest.mark.parametrize(("text", "why"), [("", "text is empty"), (" \n", "text is empty"), (None, "text is null")])
def test_an_empty_or_null_text_is_refused(text, why):
    assert why in reason({"text": text}, Schema("text"))


# --- whatever a file holds ------------------------------------------------------------------------------------------

WORDS = sorted(
    {"", "x", "\ud83d", "chosen", "rejected", "label", "type", "function", "arguments", "input", "{}", "[]", "[1]"}
    | RECORD_KEYS
    | TURN_KEYS
    | ROLES.keys()
    | {"thinking", "image_url", "tool_use", '{"name": "f", "arguments": {}}'}
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=25,
)
PARTS = st.dictionaries(st.sampled_from(["type", "text", "name", "arguments", "function"]), SCALARS, max_size=4)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(sorted(ROLES))},
    optional={
        "content": SCALARS | st.lists(PARTS, max_size=3),
        "value": SCALARS,
        "tool_calls": VALUES,
        "weight": SCALARS,
        "reasoning": SCALARS,
        "name": SCALARS,
    },
)
CHATS = st.lists(MESSAGES | VALUES, max_size=5)
RECORDS = VALUES | st.dictionaries(st.sampled_from(WORDS), CHATS | VALUES, max_size=6)


@pytest.mark.parametrize("name", SIGNS)
@settings(max_examples=30, deadline=None)
@given(values=st.lists(RECORDS, max_size=8), data=st.data())
def test_any_value_becomes_a_record_or_a_refusal(name, values, data):
    signs = {key: data.draw(CHATS | st.text(min_size=1, max_size=9) | VALUES) for key in SIGNS[name]}
    values = [*values, signs]
    schema = Schema(name, keys={"x": "content"}, roles={"x": "assistant"})
    parsed = [to_record(RawRecord(value, f"f:{n}"), schema) for n, value in enumerate(values)]
    used = [record for record, _ in parsed if isinstance(record, Record)]
    refused = [refusal for refusal, _ in parsed if isinstance(refusal, Refusal)]
    assert len(used) + len(refused) == len(values)
    for refusal in refused:
        assert refusal.reason
        refusal.reason.encode()
    for _, notes in parsed:
        "".join(notes).encode()
    for record in used:
        assert record.turns[-1].role in ("assistant", "text") and record.learned
        assert all(0 <= turn.learn <= 127 for turn in record.turns)
        for turn in record.turns:
            json.dumps([turn.text, turn.reasoning, turn.name, turn.calls], ensure_ascii=False).encode()
        json.dumps(record.tools, ensure_ascii=False).encode()


@pytest.mark.parametrize("cell", ["", "[]", [], None])
def test_an_empty_cell_of_media_refuses_no_record(cell):
    assert chat(ASK, TELL, images=cell) == chat(ASK, TELL)


@pytest.mark.parametrize("value", ["no", 0, [], "0"])
@pytest.mark.parametrize("place", ["alone", "among others"])
def test_enable_thinking_must_be_a_boolean(value, place):
    # A template treats "no" as true, and 0 if it tests `is false`: the record would be trained in the wrong mode.
    variables = {"enable_thinking": value} if place == "alone" else {"chat_template_kwargs": {"enable_thinking": value}}
    assert "enable_thinking" in why_not(ASK, TELL, **variables)


@pytest.mark.parametrize(("value", "thinks"), [(False, False), ("false", False), ("true", True)])
def test_enable_thinking_may_be_text_in_a_table_cell(value, thinks):
    assert chat(ASK, TELL, enable_thinking=value).variables == {"enable_thinking": thinks}


@pytest.mark.parametrize("key", ["enable_thinking", "documents", "chat_template_kwargs"])
@pytest.mark.parametrize("cell", ["", " ", None])
def test_an_empty_cell_sets_no_variable(key, cell):
    assert chat(ASK, TELL, **{key: cell}).variables == {}


def test_a_variable_that_a_record_sets_twice_must_be_the_same():
    kwargs = {"enable_thinking": False}
    assert chat(ASK, TELL, enable_thinking=False, chat_template_kwargs=kwargs).variables == kwargs
    said = why_not(ASK, TELL, enable_thinking=True, chat_template_kwargs=kwargs)
    assert "enable_thinking has another value in chat_template_kwargs" in said


def test_tools_and_functions_of_a_record_must_be_the_same():
    function = {"name": "look", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    assert chat(ASK, TELL, tools=tools, functions=[function]) == chat(ASK, TELL, tools=tools)
    assert chat(ASK, TELL, tools=[], functions=[function]) == chat(ASK, TELL, tools=tools)
    said = why_not(ASK, TELL, tools=tools, functions=[{**function, "name": "listen"}])
    assert "tools and functions list different tools" in said
