"""Laws of the ledger: it can be stored, and a notice and its number of records are one sentence, in both languages."""

import json

import pytest

from atomtune.data.encoding.omissions import NOT_WRITTEN
from atomtune.data.formats.detect import to_record
from atomtune.data.formats.schema import Schema
from atomtune.data.ledger import Ledger, one_of_each_reason_first
from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import Refusal, RefusalKind
from atomtune.language import in_chinese, singular
from tests.data.conftest import template_of
from tests.reading import encode, read_values


def sentence(notice: str, count: int) -> str:
    ledger = Ledger()
    ledger.notices[notice] = count
    (only,) = ledger.sentences()
    return only


def test_a_notice_is_a_sentence_with_its_number_of_records():
    # It was "…, so it is not learned, in 5 records."
    said = sentence(NOT_WRITTEN["thoughts"], 1_200)
    assert said == "in 1,200 records, the template leaves out an answer's reasoning, so it is not learned."
    assert singular(sentence(NOT_WRITTEN["text"], 1)).startswith("in 1 record, the template")


RECORDS = {
    "renamed": {"instrution": "a", "output": "b"},
    "unused": {"instruction": "a", "output": "b", "id": 7},
    "Gemini": {"contents": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}]},
    "texts": {"messages": ["a", "b"]},
    "preference": {"instruction": "a", "chosen": "b", "rejected": "c"},
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_notice_about_a_record_is_a_sentence_in_both_languages(name):
    value = RECORDS[name]
    format_name = "messages" if name in ("Gemini", "texts") else "alpaca"
    _, notices = to_record(RawRecord(value, "a.jsonl:1"), Schema(format_name))
    assert notices
    for notice in notices:
        said = sentence(notice, 12)
        assert said == f"in 12 records, {notice}."
        assert not notice.endswith((",", "."))
        assert in_chinese(said) == f"12 条记录：{in_chinese(notice)}。"
        assert in_chinese(notice) != notice
        assert not in_chinese(notice).endswith(("：", "，", "；", "。"))


@pytest.mark.parametrize("notice", NOT_WRITTEN.values())
def test_a_notice_about_an_omission_is_chinese(notice):
    assert in_chinese(sentence(notice, 3)) == f"3 条记录：{in_chinese(notice)}。"
    assert in_chinese(notice) != notice


def test_a_short_list_of_refusals_begins_with_the_most_frequent_reason():
    # inspect showed the first three, so 34 records without a place for tools were behind three odd ones.
    reasons = ["not UTF-8 at byte 9", "output is empty", "no tools", "no tools", "not UTF-8 at byte 3", "no tools"]
    refused = [Refusal(f"a:{i}", reason, RefusalKind.NO_RECORD) for i, reason in enumerate(reasons, 1)]
    in_order = [refusal.origin for refusal in one_of_each_reason_first(refused)]
    assert in_order == ["a:3", "a:1", "a:2", "a:4", "a:5", "a:6"]


def test_a_ledger_round_trips_through_json(data):
    ledger = Ledger()
    encode(read_values(data), template_of(), ledger, max_tokens=120)
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger
