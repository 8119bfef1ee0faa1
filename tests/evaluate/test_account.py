"""Account: every record that was to be evaluated is used or refused, and what is left out is named."""

from dataclasses import replace

from atomtune.data.ledger import Ledger
from atomtune.data.records import Refusal, RefusalKind
from atomtune.evaluate.account import account_of
from atomtune.language import spoken, translated


def ledger(*refused: Refusal, cut: dict[str, int] | None = None, used: int = 0) -> Ledger:
    made = Ledger(records_read=used + len(refused), records_used=used, format="alpaca")
    for refusal in refused:
        made.refuse(refusal)
    for origin, tokens in (cut or {}).items():
        made.cut(origin, tokens)
    return made


BROKEN = Refusal("a:2", "no key output", RefusalKind.NO_RECORD)
NOT_WRITTEN = Refusal("a:3", "no system role", RefusalKind.TEMPLATE)


def test_records_that_only_one_of_two_templates_refuses_are_refused_with_its_models():
    ledgers = {"base, one": ledger(BROKEN, used=2), "two": ledger(BROKEN, NOT_WRITTEN, used=1)}
    account = account_of(ledgers, ["a:1"], wanted=None, max_tokens=64, sources=["a"])
    assert account.summary() == "3 records read (alpaca), 1 used, 2 refused, 0 shortened; 0 prompt tokens cut."
    assert [refusal.origin for refusal in account.refused] == ["a:2", "a:3"]
    (note,) = account.notes()
    assert note == "not evaluated:\na:2  no key output.\na:3  no system role (template of two)."


def test_a_record_that_all_templates_refuse_is_counted_once_and_a_lone_template_is_not_named():
    broken = Refusal("a:3", "no system role", RefusalKind.TEMPLATE, broken=False)
    other = Refusal("a:3", "it is too long", RefusalKind.TOO_LONG)
    account = account_of({"one": ledger(broken), "two": ledger(other)}, [], wanted=None, max_tokens=64, sources=["a"])
    (refusal,) = account.refused
    assert (refusal.reason, refusal.broken) == ("no system role (template of one)", False)
    alone = account_of({"one": ledger(broken)}, [], wanted=None, max_tokens=64, sources=["a"])
    assert alone.refused == (broken,)


def test_a_notice_of_several_templates_counts_each_record_once():
    ledgers = {"one": ledger(used=5), "two": ledger(used=5)}
    for number, of_template in enumerate(ledgers.values(), 2):
        of_template.notices["a system prompt is left out"] = number
    account = account_of(ledgers, ["a:1"], wanted=None, max_tokens=64, sources=["a"])
    assert list(account.notes()) == ["a system prompt is left out in 3 records of a."]


def test_a_record_is_shortened_by_as_much_as_the_template_that_removes_most():
    ledgers = {"one": ledger(cut={"a:1": 5, "a:2": 3}, used=2), "two": ledger(cut={"a:1": 7}, used=2)}
    account = account_of(ledgers, ["a:1", "a:2"], wanted=None, max_tokens=64, sources=["a"])
    assert account.to_json()["records_cut"] == 2 and account.prompt_tokens_cut == 10


def test_only_held_out_records_are_counted_if_only_those_are_evaluated():
    of_file = ledger(BROKEN, NOT_WRITTEN, cut={"a:1": 5, "a:9": 100}, used=7)
    account = account_of({"one": of_file}, ["a:1"], wanted={"a:1", "a:3"}, max_tokens=64, sources=["a"])
    assert account.summary() == "2 records held out (alpaca), 1 used, 1 refused, 1 shortened; 5 prompt tokens cut."
    assert [refusal.origin for refusal in account.refused] == ["a:3"]


def test_the_account_is_entirely_in_chinese_in_a_chinese_locale():
    of_file = ledger(BROKEN, cut={"a:1": 5}, used=1)
    of_file.notices["the template leaves out a system prompt, so the model does not read it,"] = 1
    account = account_of({"base": of_file, "out": of_file}, ["a:1"], wanted=None, max_tokens=64, sources=["a"])
    account = replace(account, chosen=1)
    with spoken("zh"):
        texts = [translated(text).replace("--records", "") for text in (account.summary(), *account.notes())]
    assert texts[0] == "读入 2 条记录（alpaca）：使用 1 条，拒绝 1 条，缩短 1 条；提示共去掉 5 个词元。"
    assert all("records" not in text and "evaluated" not in text and "template" not in text for text in texts)
