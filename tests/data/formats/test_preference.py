"""Laws of preference data: the chosen answer is trained after its prompt, the rejected one never."""

import pytest

from atomtune.data.formats.detect import detect_schema, to_record
from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import ParsedRecord, Record, Refusal, Turn

QUESTION, GOOD, BAD = "夸我一句", "真棒", "笨蛋"
TURNS = (Turn("user", QUESTION), Turn("assistant", GOOD))


def asks(text: str) -> dict:
    return {"role": "user", "content": text}


def tells(text: str) -> dict:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


def read(*values: dict) -> list[ParsedRecord]:
    """Read the values as the records of one file."""
    schema = detect_schema(values, name="train.jsonl")
    return [to_record(RawRecord(value, f"train.jsonl:{n}"), schema) for n, value in enumerate(values, 1)]


#: The same answer in every format.
ANSWERED = {
    "alpaca": lambda answer: {"instruction": QUESTION, "input": "", "output": answer},
    "messages": lambda answer: {"messages": [asks(QUESTION), tells(answer)]},
    "sharegpt": lambda answer: {"conversations": [human(QUESTION), gpt(answer)]},
    "prompt": lambda answer: {"prompt": QUESTION, "completion": answer},
    "prompt of messages": lambda answer: {"prompt": [asks(QUESTION)], "completion": [tells(answer)]},
    "text": lambda answer: {"text": f"<s>Human: {QUESTION}\n</s><s>Assistant: {answer}\n</s>"},
}


@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize(("yes", "no"), [(True, False), (1, 0), (1.0, 0.0), ("true", "False"), ("1", "0")])
@pytest.mark.parametrize("format", ANSWERED)
def test_an_unwanted_answer_is_refused_in_every_format_and_label_type(format, yes, no, key):
    # Catches `label is False` as the only check: answers marked 0 or "false" were trained as good ones.
    (good, notes), (bad, _) = read({**ANSWERED[format](GOOD), key: yes}, {**ANSWERED[format](BAD), key: no})
    assert isinstance(good, Record) and good.turns == TURNS
    assert not any(key in note for note in notes), "a mark that was read is not called unused"
    assert isinstance(bad, Refusal) and bad.reason == f"{key} is {no}: an answer that is not wanted is not trained on"


@pytest.mark.parametrize("labels", [(0, 1, 2), ("sport", "news", "0")])
def test_a_label_with_many_classes_refuses_no_answer(labels):
    outcomes = [record for record, _ in read(*({**ANSWERED["alpaca"](GOOD), "label": label} for label in labels))]
    assert all(isinstance(record, Record) for record in outcomes)


@pytest.mark.parametrize("labels", [(0, 1), ("0", "1")])
def test_the_label_of_a_plain_text_is_a_class_and_refuses_no_text(labels):
    # Reviews with the class 0 (imdb) were refused as unwanted answers, which half of them are not.
    reviews = read(*({"text": f"The film runs {label + label} hours.", "label": label} for label in labels))
    for record, notes in reviews:
        assert isinstance(record, Record) and record.turns[0].role == "text"
        assert 'key "label" is not used by this format' in notes


def test_the_label_of_a_plain_text_among_dialogues_is_a_mark():
    (dialogue, _), (plain, _) = read({**ANSWERED["text"](GOOD), "label": 1}, {"text": BAD, "label": 0})
    assert isinstance(dialogue, Record) and isinstance(plain, Refusal)


def test_a_false_label_is_refused_even_beside_non_boolean_labels():
    # One "unsure" among true and false once made every unwanted answer of the file count as good.
    marks = (True, False, "unsure")
    good, bad, unsure = (record for record, _ in read(*({**ANSWERED["prompt"](GOOD), "label": mark} for mark in marks)))
    assert isinstance(good, Record) and isinstance(bad, Refusal) and isinstance(unsure, Record)


#: Pairs as published data sets write them.
PAIRS = {
    "TRL": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "TRL with messages": {"prompt": [asks(QUESTION)], "chosen": [tells(GOOD)], "rejected": [tells(BAD)]},
    "TRL with whole conversations": {
        "chosen": [asks(QUESTION), tells(GOOD)],
        "rejected": [asks(QUESTION), tells(BAD)],
    },
    "UltraFeedback": {
        "prompt": QUESTION,
        "chosen": [asks(QUESTION), tells(GOOD)],
        "rejected": [asks(QUESTION), tells(BAD)],
    },
    "LLaMA-Factory, alpaca": {"instruction": QUESTION, "input": "", "chosen": GOOD, "rejected": BAD},
    "LLaMA-Factory, sharegpt": {"conversations": [human(QUESTION)], "chosen": gpt(GOOD), "rejected": gpt(BAD)},
    "LLaMA-Factory, openai": {"messages": [asks(QUESTION)], "chosen": tells(GOOD), "rejected": tells(BAD)},
    "LLaMA-Factory v1": {
        "chosen_messages": [asks(QUESTION), tells(GOOD)],
        "rejected_messages": [asks(QUESTION), tells(BAD)],
    },
    "a message behind an instruction": {"instruction": QUESTION, "chosen": [tells(GOOD)], "rejected": [tells(BAD)]},
    "messages that chosen repeats": {
        "messages": [asks(QUESTION)],
        "chosen": [asks(QUESTION), tells(GOOD)],
        "rejected": [asks(QUESTION), tells(BAD)],
    },
    "a text behind messages": {"messages": [asks(QUESTION)], "chosen": GOOD, "rejected": BAD},
}


@pytest.mark.parametrize("shape", PAIRS)
def test_the_chosen_answer_is_learned_after_its_prompt_with_a_notice(shape):
    ((record, notes),) = read(PAIRS[shape])
    assert isinstance(record, Record) and record.turns == TURNS, record
    assert any("is learned as the answer" in note and "rejected" in note for note in notes)
    assert BAD not in str(record)


def test_the_earlier_turns_of_a_preference_pair_are_kept():
    # LLaMA-Factory's pairs with several turns once lost the last question, and the earlier answer was trained alone.
    pair = {"conversations": [human("a"), gpt("b"), human("c")], "chosen": gpt("d"), "rejected": gpt("e")}
    ((record, _),) = read(pair)
    assert [turn.text for turn in record.turns] == ["a", "b", "c", "d"]


def test_a_pair_whose_conversation_already_ends_with_an_answer_is_refused():
    ((refusal, _),) = read({"messages": [asks("a"), tells("b")], "chosen": tells("c"), "rejected": tells("d")})
    assert isinstance(refusal, Refusal) and "already ends with an answer" in refusal.reason


def test_a_chosen_text_without_a_prompt_is_refused():
    first, second = read({"text": "x"}, {"chosen": "y", "rejected": "z"})
    assert isinstance(first.outcome, Record)
    assert isinstance(second.outcome, Refusal) and "without a prompt" in second.outcome.reason
