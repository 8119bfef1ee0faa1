"""Laws of the alpaca format and of format detection: what is accepted, what is refused, and the messages."""

import itertools
import json
import re
from collections import Counter

import pytest

from atomtune.data.formats.detect import detect_schema, to_record
from atomtune.data.formats.schema import Schema
from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import ParsedRecord, Record, Refusal, Turn
from atomtune.errors import BadData
from tests.conftest import shell_words

ORIGIN = "train.jsonl:17"


def read(value: object) -> ParsedRecord:
    return to_record(RawRecord(value, ORIGIN))


def reason(value: object) -> str:
    refusal, _ = read(value)
    assert isinstance(refusal, Refusal)
    assert refusal.origin == ORIGIN
    return refusal.reason


# --- accepted -------------------------------------------------------------------------------------------------------


def test_instruction_and_input_form_the_prompt_and_output_the_answer():
    record, notes = read({"instruction": "翻译", "input": "早上好", "output": "Good morning."})
    assert record == Record((Turn("user", "翻译", "早上好"), Turn("assistant", "Good morning.")), ORIGIN)
    assert not notes


@pytest.mark.parametrize("missing", [{}, {"input": None}, {"input": ""}])
def test_an_absent_null_or_empty_input_means_no_input(missing):
    record, _ = read({"instruction": "Hi", "output": "Hello", **missing})
    assert record == Record((Turn("user", "Hi", ""), Turn("assistant", "Hello")), ORIGIN)


def test_the_tutorials_instrution_typo_is_accepted_with_a_notice():
    # The tutorial's own example says "instrution", and people copied it.
    record, notes = read({"instrution": "1+1=?", "input": "", "output": "2"})
    assert record.prompt == (Turn("user", "1+1=?"),)
    (note,) = notes
    assert "instrution" in note and "instruction" in note


@pytest.mark.parametrize("keys", [("instrution", "instruction"), ("instruction", "instrution")])
def test_a_correct_instruction_key_takes_precedence_over_the_typo(keys):
    record, notes = read({**{key: key for key in keys}, "output": "2"})
    assert record.prompt == (Turn("user", "instruction"),)
    assert notes == ('key "instrution" is not used by this format',)


def test_texts_are_kept_without_stripping_white_space():
    # Catches strip(): leading spaces and newlines are part of the text to learn.
    texts = {"instruction": "  code:\n", "input": "\tx\r\n", "output": "\n    return x  \n"}
    record, _ = read(texts)
    assert record.turns == (Turn("user", texts["instruction"], texts["input"]), Turn("assistant", texts["output"]))


def test_unused_keys_with_a_value_are_counted_and_empty_ones_are_not():
    counts = Counter()
    for value in ({"id": 0, "tags": []}, {"id": 7, "tags": ["a", "b"]}, {"id": 8, "source": ""}):
        record, notes = read({"instruction": "Hi", "output": "Hello", **value})
        assert isinstance(record, Record)
        counts.update(notes)
    assert counts == {f'key "{key}" is not used by this format': count for key, count in (("id", 3), ("tags", 1))}


def test_the_system_text_and_history_come_before_the_question():
    record, _ = read(
        {"system": "Be brief.", "history": [["a?", "a."], ["b?", "b."]], "instruction": "c?", "output": "c."}
    )
    assert [(turn.role, turn.text) for turn in record.turns] == [
        *[("system", "Be brief."), ("user", "a?"), ("assistant", "a."), ("user", "b?"), ("assistant", "b.")],
        *[("user", "c?"), ("assistant", "c.")],
    ]


def test_a_text_under_the_key_of_a_variable_is_refused_with_what_to_do():
    said = reason({"instruction": "Hi", "output": "Hello", "documents": "Two letters."})
    assert "documents is not JSON" in said and "rename it" in said


@pytest.mark.parametrize("history", ["text", [["only a question"]], [["a", 1]], {"a": "b"}])
def test_a_history_that_is_not_pairs_of_texts_is_refused(history):
    assert "history" in reason({"instruction": "x", "output": "y", "history": history})


@pytest.mark.parametrize(
    ("beside", "variables"),
    [
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ({"enable_thinking": "true"}, {"enable_thinking": True}),  # in the cell of a table
        ({"chat_template_kwargs": {"style": "short"}}, {"style": "short"}),
        ({"documents": [{"text": "Fog."}]}, {"documents": [{"text": "Fog."}]}),
        ({"enable_thinking": None, "documents": ""}, {}),
    ],
)
def test_a_record_sets_variables_of_its_template(beside, variables):
    # They were once left out with a notice, and the record was learned in the mode of the whole run.
    record, notes = read({"instruction": "Hi", "output": "Hello", **beside})
    assert isinstance(record, Record) and record.variables == variables
    assert not notes


# --- refused --------------------------------------------------------------------------------------------------------


def test_a_missing_key_error_lists_the_keys_present():
    said = reason({"prompt": "Hi", "instruction": "x", "response": "Hello"})
    assert 'no key "output"' in said
    for key in ("prompt", "instruction", "response"):
        assert key in said


def test_a_missing_key_error_spells_present_keys_as_in_the_file():
    # The user searches the file for the word in the message.
    said = reason({"instrution": "Hi", "response": "Hello"})
    assert "instrution" in said.partition("keys here")[2]


def test_an_empty_object_is_refused_with_its_keys_listed_as_none():
    assert "none" in reason({})


@pytest.mark.parametrize(
    ("value", "kind"),
    [(None, "null"), ([1], "a list"), ("text", "text"), (1, "a number"), (1.5, "a number"), (True, "a boolean")],
)
def test_a_value_that_is_not_an_object_is_refused_with_its_type(value, kind):
    said = reason(value)
    assert said.startswith(kind) and "expected an object" in said


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [(None, "null"), (3, "a number"), (False, "a boolean"), (["a"], "a list"), ({"a": 1}, "an object")],
)
@pytest.mark.parametrize("key", ["instruction", "output"])
def test_a_text_of_the_wrong_type_is_refused_with_its_key(key, wrong, kind):
    # Catches str(value): the texts "None" or "['a']" would be trained.
    assert f"{key} is {kind}" in reason({"instruction": "Hi", "output": "Hello", key: wrong})


def test_an_input_of_a_wrong_type_is_refused():
    assert "input is a number" in reason({"instruction": "Hi", "input": 5, "output": "Hello"})


@pytest.mark.parametrize("output", ["", " ", "\n\t\u3000"])
def test_an_empty_output_is_refused(output):
    assert "output is empty" in reason({"instruction": "Hi", "output": output})


def test_instruction_and_input_may_not_both_be_empty():
    assert "both empty" in reason({"instruction": " ", "input": "\n", "output": "Hello"})


def test_an_input_without_an_instruction_is_accepted():
    record, _ = read({"instruction": "", "input": "你是谁?", "output": "我。"})
    assert record.prompt == (Turn("user", "", "你是谁?"),)


def test_a_lone_surrogate_is_refused_with_its_position():
    # json.loads accepts it, and the tokenizer would fail in the middle of the file, without a line number.
    value = json.loads('{"instruction": "Hi", "output": "ab\\ud83d"}')
    assert "output holds half a surrogate pair at character 3" in reason(value)


def test_a_whole_surrogate_pair_is_one_character():
    record, _ = read(json.loads('{"instruction": "Hi", "output": "\\ud83d\\ude00"}'))
    assert record.answer == "😀"


@pytest.mark.parametrize("record", [{"\ud83d": 1}, {"\ud83d": 1, "instruction": "Hi", "output": "Hello"}])
def test_reasons_and_notices_can_be_encoded_as_utf_8(record):
    # A key may contain half a surrogate pair; a reason or notice that repeats it would break run.json.
    outcome, notes = read(record)
    said = [*notes, *([outcome.reason] if isinstance(outcome, Refusal) else [])]
    assert said
    for text in said:
        text.encode("utf-8")


def test_all_problems_of_a_record_come_in_one_reason():
    # The user should have to correct a record only once.
    said = reason({"instruction": 7, "input": ["x"], "response": "Hello"})
    assert "instruction is a number" in said
    assert "input is a list" in said
    assert 'no key "output"' in said


def test_a_refusal_does_not_repeat_the_text_of_the_record():
    # Data may be private, and run.json is shared.
    assert "secret" not in reason({"instruction": "my secret", "input": 3, "output": ""})


def test_the_answers_of_a_history_are_learned_too():
    record, _ = read({"history": [["a?", "a."], ["b?", "b."]], "instruction": "c?", "output": "c."})
    assert record.learned == (1, 3, 5)


@pytest.mark.parametrize("history", [None, "", " ", [], "[]"])
def test_an_empty_history_value_means_no_history(history):
    record, _ = read({"instruction": "x", "output": "y", "history": history})
    assert record.turns == (Turn("user", "x"), Turn("assistant", "y"))


def test_empty_texts_in_a_history_are_refused_with_their_position():
    said = reason({"instruction": "x", "output": "y", "history": [["a?", "a."], ["b?", " "], ["", "c."]]})
    assert "history 2's answer is empty: there is nothing to learn" in said
    assert "history 3's question is empty" in said


# --- recognising ----------------------------------------------------------------------------------------------------

SIGNED = {
    "alpaca": {"instruction": "x", "output": "y"},
    "sharegpt": {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
    "messages": {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    "prompt": {"prompt": "x", "completion": "y"},
    "text": {"text": "x"},
}


def told(values: list, **named: object) -> str:
    with pytest.raises(BadData) as raised:
        detect_schema(values, name="train.jsonl", **named)
    return str(raised.value)


@pytest.mark.parametrize("name", SIGNED)
def test_a_format_is_detected_by_its_keys(name):
    assert detect_schema([None, {"id": 1}, SIGNED[name]], name="train.jsonl") == Schema(name)


@pytest.mark.parametrize(("one", "other"), itertools.permutations(SIGNED, 2))
def test_a_file_that_fits_two_formats_requires_the_format_option(one, other):
    for values in ([{**SIGNED[one], **SIGNED[other]}], [SIGNED[one], SIGNED[other]]):
        said = told(values)
        assert f"--format {one}" in said and f"--format {other}" in said and said.startswith("train.jsonl fits ")
        assert detect_schema(values, format_choice=other, name="train.jsonl") == Schema(other)


def test_an_ambiguous_format_error_names_the_keys_and_the_options():
    assert told([{**SIGNED["alpaca"], **SIGNED["messages"]}]) == (
        "train.jsonl fits alpaca (instruction, output) and messages (messages): "
        "pass --format alpaca or --format messages."
    )


@pytest.mark.parametrize("nothing", [None, "", []])
def test_a_column_without_a_value_does_not_indicate_a_format(nothing):
    # A table has all columns, also those that only other rows use.
    assert detect_schema([{**SIGNED["alpaca"], "messages": nothing, "text": nothing}], name="t").name == "alpaca"


def test_a_record_with_an_empty_output_is_detected_as_alpaca():
    # Each record is then refused at its line, with its own reason.
    assert detect_schema([{"instruction": "x", "output": ""}], name="t").name == "alpaca"


@pytest.mark.parametrize("values", [[], [None, 3, "text", [1]]])
def test_a_file_without_objects_is_treated_as_alpaca(values):
    assert detect_schema(values, name="t") == Schema("alpaca")


def test_an_unknown_format_error_names_the_keys_and_the_closest_format():
    said = told([{"instruction": "x", "response": "y"}])
    assert 'no key "output"; keys here: instruction, response' in said
    assert "closest is alpaca" in said and "--keys response=output" in said


def test_the_keys_of_a_format_must_be_in_one_record():
    assert "fits no format" in told([{"instruction": "x"}, {"output": "y"}])


def test_a_misspelt_key_gets_a_suggestion():
    assert "--keys ouput=output" in told([{"instruction": "x", "ouput": "y"}])
    assert "--keys mesages=messages" in told([{"mesages": []}])


def test_a_system_prompt_under_another_name_is_part_of_the_suggestion():
    said = told([{"id": "1", "system_prompt": "Be kind.", "question": "x", "response": "y"}])  # OpenOrca
    assert "--keys question=instruction,response=output,system_prompt=system." in said
    assert "--keys dialog=conversations,system_message=system." in told([{"system_message": "x", "dialog": TURNS}])


def test_the_columns_of_a_customer_service_get_a_suggestion():
    said = told([{"编号": "1", "用户": "在吗？", "客服": "在的。"}])
    assert shell_words(said.rpartition("pass --keys ")[2].removesuffix(".")) == ["用户=instruction,客服=output"]


TURNS = [{"from": "human", "value": "x"}]


@pytest.mark.parametrize(
    ("value", "option"),
    [
        ({"inputs": "x", "targets": "y"}, "inputs=instruction,targets=output"),  # not inputs=input too
        ({"instruction": "x", "input": "z", "response": "y"}, "response=output"),  # not input=input
        ({"content": "x", "id": 3}, "YOURS=instruction,content=output"),  # one key is not both
        ({"history": [], "prompt": "x", "response": "y"}, "prompt=instruction,response=output"),  # only alpaca has it
        ({"instruction": "x", "dialog": TURNS}, "dialog=conversations"),  # the whole of one format, half of another
        ({"dialog": "an id", "turns": TURNS}, "turns=conversations"),
        ({"instruction": "x", "Response": "y"}, "Response=output"),
        ({"prompt": "x", "answer": "y", "cot": "z"}, "answer=completion,cot=reasoning_content"),
    ],
)
@pytest.mark.parametrize("records", [1, 2])
def test_the_suggested_keys_option_maps_what_the_nearest_format_needs(value, option, records):
    # A file with a single conversation was told that its turns seem to be the records.
    assert told([value] * records).endswith(f"pass --keys {option}.")


def test_a_key_with_a_list_of_objects_in_each_of_several_records_holds_no_records():
    assert "--keys dialog=conversations" in told([{"dialog": [{"a": 1}]}] * 2)


@pytest.mark.parametrize("key", ["out put", "output;id", "$output", "`output`", "out'put", "output=", "回答"])
def test_a_suggested_keys_option_is_one_word_for_a_shell(key):
    # A key with a space gave a broken command, one with a semicolon a second command.
    option = told([{"instruction": "x", key: "y"}]).rpartition("pass --keys ")[2].removesuffix(".")
    assert shell_words(option) == [f"{key}=output"]


@pytest.mark.parametrize("key", ["data", "my data", "'; touch x; '", '"', "\\(x)", "\x1b[31m", "数据", "a\u2028b", ""])
def test_a_suggested_jq_command_reads_the_list_of_any_key(key):
    # Without jq here, its program is checked: a key in brackets is a JSON text. jq reads \\( in it as a program.
    command = told([{key: [{"a": 1}]}]).rpartition(": jq ")[2]
    assert not key.isalpha() or key in command
    assert command.endswith(" OLD > NEW.jsonl")
    flag, program = shell_words(command.removesuffix(" OLD > NEW.jsonl"))
    assert flag == "-c"
    assert program.startswith(".[") and program.endswith("][]")
    assert json.loads(program[2:-3]) == key
    assert command.isprintable() and not re.search(r"(?<!\\)(\\\\)*\\\(", program)


def test_preference_data_without_a_prompt_is_reported_as_such():
    assert "preference data (chosen, rejected) without a prompt" in told([{"chosen": "y", "rejected": "z"}])


def test_a_user_key_for_the_answer_takes_precedence_over_preference_data():
    value = {"prompt": "x", "chosen": "y", "rejected": "z"}
    schema = detect_schema([value], keys={"chosen": "completion"}, name="t")
    record = to_record(RawRecord(value, ORIGIN), schema).outcome
    assert isinstance(record, Record) and record.answer == "y"


def test_user_defined_keys_map_to_the_keys_of_the_format():
    keys = {"question": "instruction", "answer": "output"}
    for more in ({}, {"output": "the user named another"}):
        value = {"question": "x", "answer": "y", **more}
        record, notes = to_record(RawRecord(value, ORIGIN), detect_schema([value], keys=keys, name="t"))
        assert record == Record((Turn("user", "x"), Turn("assistant", "y")), ORIGIN)
    assert notes == ('key "output" is not used, "answer" is read instead',)


def test_user_defined_keys_may_swap_two_keys():
    value = {"instruction": "y", "output": "x"}
    schema = detect_schema([value], keys={"instruction": "output", "output": "instruction"}, name="t")
    record, notes = to_record(RawRecord(value, ORIGIN), schema)
    assert record == Record((Turn("user", "x"), Turn("assistant", "y")), ORIGIN)
    assert not notes


def test_all_unknown_user_defined_keys_are_reported_at_once():
    said = told([SIGNED["messages"]], keys={"ask": "instruction", "words": "content", "id": "messges"})
    assert 'no key "ask"' in said and "keys here: messages" in said
    assert 'no key "words"' in said and "keys here: role, content" in said
    assert 'there is no key "messges"; did you mean messages?' in said


def test_an_unknown_target_role_error_lists_the_known_roles():
    assert "--roles bot=asistant: expected system, user, assistant, tool or function_call" in told(
        [SIGNED["messages"]], roles={"bot": "asistant"}
    )


def test_a_role_may_be_named_in_any_accepted_way_but_not_by_our_own_word_for_a_call():
    assert detect_schema([SIGNED["text"]], roles={"bot": "gpt"}, name="t").all_roles()["bot"] == "assistant"
    assert "--roles bot=call: expected" in told([SIGNED["text"]], roles={"bot": "call"})


def test_a_user_defined_key_must_occur_where_its_target_does():
    assert 'no key "ask"' in told([{"messages": [{"ask": "x"}]}], keys={"ask": "instruction"})
    assert 'no key "ask"' in told([{"ask": [], "messages": [{"role": "user"}]}], keys={"ask": "content"})
    # Of a file without objects, or of turns that are not there, nothing is known.
    for values in ([], [None, 3]):
        assert detect_schema(values, keys={"ask": "instruction"}, name="t").keys == {"ask": "instruction"}


def test_two_user_defined_keys_cannot_map_to_one_key():
    assert "output is already taken by another key" in told([SIGNED["text"]], keys={"text": "output", "b": "output"})
