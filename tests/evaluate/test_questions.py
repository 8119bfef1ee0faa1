"""Questions: each learned answer of a record, with the prompt that a server would be sent for it."""

from atomtune.data.encoded_source import Rules
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.records import Example, Record, Turn
from atomtune.evaluate.questions import answer_text, eval_record, read_records
from atomtune.model.generate import prompt_ids
from tests.conftest import DIALOGUES, write_jsonl
from tests.tiny import CHATML, tokenizer_of


def test_a_question_has_chats_prompt_and_the_answer_with_its_stop_token(tmp_path):
    template = load_template("atom", tokenizer_of("sentencepiece"))
    records, _ = read_records([str(write_jsonl(tmp_path / "d.jsonl", DIALOGUES))], template, Rules(max_tokens=256))
    assert len(records) == len(DIALOGUES)
    for record, dialogue in zip(records.values(), DIALOGUES, strict=True):
        (question,) = record.questions
        messages = template.messages([Turn("user", dialogue["instruction"], dialogue["input"])])
        assert list(question.prompt_ids) == prompt_ids(template, messages)
        assert question.reference == dialogue["output"]
        assert record.user_text == "\n".join(filter(None, (dialogue["instruction"], dialogue["input"])))
        assert question.reference_ids[-1] == template.tokenizer.eos_token_id


def test_each_answer_of_a_conversation_is_a_question_with_all_earlier_turns(tmp_path):
    turns = [
        ("user", "你是谁？"),
        ("assistant", "我是灯塔的看守人。"),
        ("user", "晚安"),
        ("assistant", "晚安，愿你好梦。"),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    template = load_template("auto", tokenizer_of("bytes", CHATML))
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": messages}])
    records, _ = read_records([str(path)], template, Rules(max_tokens=256))
    (record,) = records.values()
    assert [question.reference for question in record.questions] == [turns[1][1], turns[3][1]]
    assert list(record.questions[1].prompt_ids) == prompt_ids(template, messages[:3])
    assert record.user_text == "晚安"


def test_only_what_is_learned_is_asked_with_the_users_words_before_it():
    tokenizer = tokenizer_of("bytes", CHATML)
    example = Example((5, 6, 7, 8), (0, 0, 1, 1), "a:1")
    call = ({"name": "weather", "arguments": {}},)
    turns = (
        *(Turn("user", "Who?"), Turn("assistant", "I."), Turn("user", "Rain?")),
        Turn("assistant", "", calls=call, learn=0),
    )
    record = eval_record(Record(turns, "a:1"), (example,), tokenizer)
    assert (record.user_text, record.calls, len(record.questions)) == ("Who?", False, 1)
    text = eval_record(Record((Turn("text", "A text."),), "a:2"), (example,), tokenizer)
    assert (text.user_text, text.questions, text.examples) == ("", (), (example,))


def test_a_character_split_by_the_token_limit_is_left_out_of_the_text():
    tokenizer = tokenizer_of("bytes", CHATML)
    ids = tokenizer("灯亮", add_special_tokens=False)["input_ids"]
    assert answer_text(ids, tokenizer, stopped=False) == "灯亮"
    assert answer_text(ids[:-1], tokenizer, stopped=False) == "灯"
    # If the model itself ended there, its answer is not "灯" and must not count as equal to it.
    assert answer_text(ids[:-1], tokenizer) == "灯\ufffd"


def test_only_wanted_records_are_taken(tmp_path):
    template = load_template("atom", tokenizer_of("sentencepiece"))
    path = write_jsonl(tmp_path / "d.jsonl", DIALOGUES)
    records, _ = read_records([str(path)], template, Rules(max_tokens=256), frozenset({"d.jsonl:3", "d.jsonl:5"}))
    assert list(records) == [(0, "d.jsonl:3"), (0, "d.jsonl:5")]
