"""Laws of the ledger: it can be stored, and a notice and its number of records are one sentence, in both languages."""

import json
from functools import partial

import pytest

from atomtune.data.encoding.omissions import NOT_WRITTEN
from atomtune.data.formats.detect import to_record
from atomtune.data.formats.schema import Schema
from atomtune.data.ledger import (
    Ledger,
    about_broken,
    first_few,
    listed_refusals,
    one_of_each_reason_first,
    refuse_broken,
    refuse_unusable,
)
from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import Example, Refusal, RefusalKind
from atomtune.errors import SHOWN, BadData
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


def refusals(*reasons: str) -> list[Refusal]:
    return [Refusal(f"a:{i}", reason, RefusalKind.NO_RECORD) for i, reason in enumerate(reasons, 1)]


def test_ledgers_add_up():
    total = Ledger()
    for number, format_name in enumerate(("alpaca", "text", "alpaca"), 1):
        ledger = Ledger(records_read=3, records_used=2, prompt_tokens=number, longest_tokens=9 - number)
        ledger.format = format_name
        ledger.refuse(refusals("broken")[0], target_tokens=5)
        ledger.cut(f"a:{number}", 7)
        ledger.notices["note"] += 2
        total.add(ledger)
    assert (total.records_read, total.records_used, len(total.records_refused)) == (9, 6, 3)
    assert (total.prompt_tokens, total.target_tokens_refused) == (1 + 2 + 3, 3 * 5)
    assert (total.longest_tokens, total.format) == (8, "alpaca, text")
    assert (total.cut_origins, total.prompt_tokens_cut) == (["a:1", "a:2", "a:3"], 3 * 7)
    assert total.notices == {"note": 6}


def test_a_format_is_named_once_however_many_files_have_it():
    # Two folders with files of two formats were "alpaca, messages, alpaca, messages".
    total = Ledger(format="alpaca, messages")
    for format_name in ("messages, alpaca", "", "text, alpaca"):
        total.add(Ledger(format=format_name))
    assert total.format == "alpaca, messages, text"


def test_used_records_are_counted_with_their_examples():
    ledger = Ledger()
    for lengths in ((3, 7), (5,)):
        examples = [Example((1,) * length, (0,) * (length - 1) + (1,), "a:1") for length in lengths]
        ledger.use(examples, prompt_tokens=2, target_tokens=4)
    assert (ledger.records_used, ledger.examples, ledger.longest_tokens) == (2, 3, 7)
    assert (ledger.prompt_tokens, ledger.target_tokens) == (4, 8)


def test_only_broken_records_stop_a_run():
    too_long = Refusal("a:1", "it is too long", RefusalKind.TOO_LONG, broken=False)
    ledger = Ledger(records_read=4, records_used=2, records_refused=[too_long])
    refuse_broken(ledger, skip_bad=False)
    ledger.records_refused += refusals("x")
    assert about_broken(ledger).startswith("broken records, 1 of 4: ")
    with pytest.raises(BadData) as raised:
        refuse_broken(ledger, skip_bad=False)
    assert str(raised.value).splitlines()[:2] == [
        "a:1  x.",
        "2 of 4 records refused. --skip_bad trains on the other 2.",
    ]


def test_a_message_names_the_file_that_lists_all_refusals():
    ledger = Ledger(records_read=1, records_refused=refusals("x"))
    for refuse in (
        partial(refuse_unusable, ledger, ["a"]),
        partial(refuse_broken, ledger, skip_bad=False),
    ):
        with pytest.raises(BadData) as raised:
            refuse(all_in="run.json")
        assert str(raised.value).splitlines()[:2] == ["a:1  x.", "run.json lists them all."]
    assert listed_refusals(ledger.records_refused) == "a:1  x."


def test_all_refusals_are_listed_while_a_message_can_hold_them():
    assert listed_refusals(refusals(*["x"] * SHOWN)).count("  x.") == SHOWN
    listed = listed_refusals(refusals(*["at byte 7"] * SHOWN, "y"))
    assert (listed.count("at byte"), listed.count("  y.")) == (3, 1)
    assert f"{SHOWN - 3} more" in listed


def test_the_first_few_origins_are_named_and_the_others_counted():
    assert first_few(["a", "b", "c", "d", "e"], all_in="run.json") == "a, b, c, d, e"
    assert first_few(["a"] * 7, all_in="run.json") == "a, a, a, a, a and 2 more (run.json lists them all)"


def test_skip_bad_is_suggested_only_if_records_are_left():
    ledger = Ledger(records_read=2, records_refused=refusals("x", "y"))
    with pytest.raises(BadData, match=r"2 of 2 records refused\.$"):
        refuse_broken(ledger, skip_bad=False)
    with pytest.raises(BadData, match="none of 2 records can be used"):
        refuse_unusable(ledger, ["a.jsonl"])
    ledger.records_read, ledger.records_used = 3, 1
    with pytest.raises(BadData, match=r"2 of 3 records refused\. --skip_bad trains on the other 1\.$"):
        refuse_broken(ledger, skip_bad=False)
    refuse_broken(ledger, skip_bad=True)
    refuse_unusable(ledger, ["a.jsonl"])


def test_a_ledger_round_trips_through_json(data):
    ledger = Ledger()
    encode(read_values(data), template_of(), ledger, max_tokens=120)
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger
