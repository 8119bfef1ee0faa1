"""Counts and marks of a data set, compared with loops over its records one at a time."""

import json
import random
import sys
import unicodedata
from collections import Counter

import numpy
import pytest

from atomtune.analysis.texts import own_text, sampled_rows
from atomtune.analysis.unicode_scripts import SCRIPTS, letters_of
from atomtune.choices import CHECKS
from atomtune.data.example_table import as_table
from atomtune.data.ledger import Ledger
from atomtune.data.records import Example, Record, Refusal, RefusalKind, Turn
from atomtune.inspect.checks import findings_of, near_or_equal, read_tokens
from tests.analysis.reading import texts_of
from tests.conftest import SHARED_DATA

STOP, UNKNOWN = 2, 0
NAMED = {
    "Han": ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH"),
    "Latin": ("LATIN", "FULLWIDTH LATIN"),
    "Kana": ("HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA"),
    "Hangul": ("HANGUL", "HALFWIDTH HANGUL"),
    "Cyrillic": ("CYRILLIC",),
    "Arabic": ("ARABIC",),
}


def dialogue(question: str, answer: str, origin: str = "a:1", **more: str) -> Record:
    return Record((Turn("user", question, more.get("input", "")), Turn("assistant", answer)), origin)


def some_records(seed: int, count: int = 60) -> list[tuple[Example, ...]]:
    """Records of one or two Examples with one to three answers; some are one token, unknown or without a stop."""
    draw = random.Random(seed)

    def example() -> Example:
        ids, learn = [1], [0]
        for _ in range(draw.randint(1, 3)):
            asked = draw.randint(1, 6)
            ids += [draw.randint(3, 6) for _ in range(asked)]
            learn += [0] * asked
            answer = [draw.choice([3, 4, UNKNOWN]) for _ in range(draw.randint(1, 4))] + [draw.choice([STOP, STOP, 5])]
            ids += answer
            learn += [draw.randint(1, 2)] * len(answer)
        return Example(tuple(ids), tuple(learn), f"a:{seed}")

    return [tuple(example() for _ in range(draw.randint(1, 2))) for _ in range(count)]


def answers_in(examples: tuple[Example, ...]) -> list[list[int]]:
    """The target spans, found token by token."""
    found: list[list[int]] = []
    for example in examples:
        before = 0
        for number, learn in zip(example.ids, example.learn, strict=True):
            if learn and not before:
                found.append([])
            if learn:
                found[-1].append(number)
            before = learn
    return found


@pytest.mark.parametrize("seed", range(6))
def test_token_statistics_match_a_token_by_token_count(seed):
    records = some_records(seed)
    tables = [as_table(records[:17]), as_table(records[17:18]), as_table(records[18:])]
    seen = read_tokens(tables, stops=[STOP], unknown=UNKNOWN)
    answers = [answers_in(one) for one in records]
    assert seen.longest.tolist() == [max(len(example.ids) for example in one) for one in records]
    assert seen.read.tolist() == [sum(example.learn.count(0) for example in one) for one in records]
    assert seen.answers.tolist() == [len(answer) for one in answers for answer in one]
    assert seen.one_token.tolist() == [any(len(answer) <= 2 for answer in one) for one in answers]
    assert seen.no_stop.tolist() == [any(answer[-1] != STOP for answer in one) for one in answers]
    assert seen.unknown.tolist() == [any(UNKNOWN in answer for answer in one) for one in answers]


def test_unknown_tokens_outside_answers_are_not_reported():
    seen = read_tokens([as_table([(Example((1, 0, 5, 2), (0, 0, 1, 1), "a:1"),)])], stops=[2], unknown=0)
    assert not seen.unknown.any()


def test_letters_belong_to_the_script_in_their_unicode_name():
    letters = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Lu", "Ll", "Lo", "Lt")]
    rows = letters_of(letters)
    told = [SCRIPTS[row.argmax()] if row.any() else "none" for row in rows]
    names = [unicodedata.name(letter, "") for letter in letters]
    wanted = [next((script for script, starts in NAMED.items() if name.startswith(starts)), "other") for name in names]
    wrong = Counter((a, b) for a, b in zip(wanted, told, strict=True) if a != b)
    # SCRIPTS knows blocks, not letters, so mathematical letters and letters far from their script's block differ.
    assert wrong.total() < len(letters) / 300
    assert not any(script in ("Han", "Hangul") for script, _ in wrong)


@pytest.mark.parametrize("text", ["0123456789", " \n\t", "，。！？《》…", "😀👍🏽", "→≈½", ".,;:'\"()[]", "", "①②"])
def test_non_letters_belong_to_no_script(text):
    assert not letters_of([text]).any()


def test_letters_are_counted_per_text():
    assert letters_of(["", "ab你", "", "Привет"])[:, :5].tolist() == [
        [0] * 5,
        [1, 2, 0, 0, 0],
        [0] * 5,
        [0, 0, 0, 0, 6],
    ]


def test_a_shared_instruction_above_an_input_does_not_make_records_similar():
    style = "请模仿一位古代的人物说话，语气要庄重，不要使用现代的词语，也不要解释你为什么这样说。" * 3
    asked = [dialogue(style, f"答案{c}{c}，如此而已", input=f"第{c}个问题是什么{c}") for c in "甲乙丙丁"]
    records = [Record((Turn("system", style), *one.turns), one.origin) for one in asked]
    assert style not in own_text(records[0])
    assert texts_of(records).near.tolist() == [0, 1, 2, 3]


def test_a_beginning_shared_by_later_records_only_does_not_make_them_similar():
    # Catches a search in the first records alone, as when a file of general records comes before the user's own.
    persona = "You are the keeper of a lighthouse who answers in short and friendly sentences. " * 5
    general = [dialogue(f"{n * 7919 % 1009} {n * n}?", f"{n * 31}") for n in range(1000)]
    own = [dialogue(f"{persona}{n * 6007 % 1009} {n * n * n}?", f"{n * 37}") for n in range(1000)]
    groups = texts_of([*general, *own]).near[1000:]
    assert numpy.unique(groups, return_counts=True)[1].max() < 20


def test_rows_to_sample_come_from_every_part_of_the_sources():
    few, many, none = sampled_rows([100, 9900, 0])
    assert len(few) + len(many) == 1000 and none == []
    assert few == sorted(set(few)) and many == sorted(set(many))
    assert 1 <= len(few) <= 30 and max(few) < 100
    assert all(50 < sum(start <= row < start + 990 for row in many) < 150 for start in range(0, 9900, 990))
    assert sampled_rows([2, 3]) == [[0, 1], [0, 1, 2]], "all, if they are few"


def test_read_texts_collects_prompts_answers_scripts_and_blank_answers():
    records = [
        dialogue("你好", "早上好"),
        dialogue("你好", "Good morning"),
        dialogue("hello", " \n"),
        dialogue("1", "2"),
    ]
    seen = texts_of(records)
    assert seen.prompts[0] == seen.prompts[1] != seen.prompts[2]
    assert len(set(seen.answers.tolist())) == 4
    assert [SCRIPTS[script] if script >= 0 else None for script in seen.script] == ["Han", "Latin", "Latin", None]
    assert seen.letters.sum() == 5 + 2 + 11 + 5
    assert seen.blank.tolist() == [False, False, True, False]


def test_a_learned_answer_is_blank_if_it_has_neither_text_nor_calls():
    question, empty, answer = Turn("user", "q"), Turn("assistant", " "), Turn("assistant", "a")
    call = Turn("assistant", "", calls=({"name": "f", "arguments": {}},))
    records = {
        "a call": ([question, call], False),
        "the first of two answers": ([question, empty, question, answer], True),
        "an answer that is not learned": ([question, Turn("assistant", "", learn=False), question, answer], False),
    }
    for name, (turns, is_blank) in records.items():
        assert texts_of([Record(tuple(turns), "a:1")]).blank.tolist() == [is_blank], name


def test_answers_with_other_thoughts_or_calls_differ():
    answers = [
        Turn("assistant", "a"),
        Turn("assistant", "a", reasoning="b"),
        Turn("assistant", "a", calls=({"name": "f", "arguments": {}},)),
    ]
    seen = texts_of([Record((Turn("user", "q"), answer), "a:1") for answer in [*answers, *answers]])
    assert seen.answers[:3].tolist() == seen.answers[3:].tolist()
    assert len(set(seen.answers.tolist())) == 3


def test_how_many_records_are_buffered_changes_nothing(monkeypatch):
    records = [dialogue(f"{n}", text * (n + 1)) for n, text in enumerate(["ab", "你", "", "Привет", "12", "ン", "é"])]
    whole = vars(texts_of(records))
    for at_once in (1, 2, 7):
        monkeypatch.setattr("atomtune.analysis.texts._AT_ONCE", at_once)
        for name, column in vars(texts_of(records)).items():
            assert (column.dtype, column.tolist()) == (whole[name].dtype, whole[name].tolist()), name


def test_the_boundary_of_instruction_and_input_distinguishes_prompts():
    one, other = (texts_of([dialogue(a, "x", input=b)]).prompts[0] for a, b in (("ab", "c"), ("a", "bc")))
    assert one != other


def problems(records: list[Record], tables, ledger: Ledger | None = None):
    texts, tokens = texts_of(records), read_tokens(tables, stops=[STOP], unknown=None)
    none = numpy.zeros(0, dtype=numpy.int64)
    return findings_of(ledger or Ledger(), texts, tokens, {"cut": none, "control": none}), texts, tokens


def test_copies_near_copies_and_conflicts_are_counted_once_each():
    long = "从前有一座山，山上有一盏灯，灯下有一个人在读书，读的是一本很旧很旧的书。"
    told = [("a", long), ("a", long), ("b", "其他"), ("a", long + "！"), ("c", "完全不同的话"), ("b", "另一种说法")]
    records = [dialogue(question, answer, f"a:{i}") for i, (question, answer) in enumerate(told)]
    ids = {pair: 10 + i for i, pair in enumerate(dict.fromkeys(told))}
    tables = [as_table([(Example((1, ids[pair], STOP), (0, 1, 1), "a:1"),) for pair in told])]
    found, texts, tokens = problems(records, tables)
    assert list(found) == list(CHECKS)
    assert (found["duplicates"].count, found["duplicates"].rows.tolist()) == (1, [0, 1])
    # Record 3 is near record 0. Record 1 is a copy of 0 and counts as a duplicate only.
    assert (found["near_duplicates"].count, found["near_duplicates"].rows.tolist()) == (1, [0, 3])
    # Prompt b has two answers, and so has prompt a, written in two ways that differ by one character.
    assert (found["conflicts"].count, found["conflicts"].rows.tolist()) == (5, [0, 1, 3, 2, 5])
    assert found["conflicts"].groups == 2
    assert near_or_equal(texts, tokens).tolist() == [0, 0, 2, 0, 4, 5]


def test_questions_about_one_document_are_not_near_duplicates():
    # Once, four of five records of a RAG data set counted as near duplicates. They do stay on one side of a split.
    draw = random.Random(4)
    page = "".join(draw.choices("甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉", k=3000))
    asked = [
        ("谁？", "甲方。", page),
        ("何时？", "三十日内。", page),
        ("何时", "三十日内", page + "！"),
        ("谁？", "甲方。", page[:2990]),
    ]
    shapes = {
        "input": [
            dialogue(f"只看文档。{ask}", tell, f"a:{i}", input=text) for i, (ask, tell, text) in enumerate(asked)
        ],
        "turns": [
            Record((Turn("user", text), Turn("assistant", "好"), Turn("user", ask), Turn("assistant", tell)), f"a:{i}")
            for i, (ask, tell, text) in enumerate(asked)
        ],
    }
    tables = [as_table([(Example((1, 9 + i, STOP), (0, 1, 1), "a:1"),) for i in range(len(asked))])]
    for shape, records in shapes.items():
        found, texts, tokens = problems(records, tables)
        assert len(set(texts.near.tolist())) == 1, shape
        assert near_or_equal(texts, tokens).tolist() == [0, 1, 1, 0], shape
        assert found["near_duplicates"].count == 2


def test_other_texts_are_compared_apart_only_beside_one_that_is_eight_times_as_long():
    # Two records with this text in common then have a Jaccard index of 0.8, however different their other texts are.
    assert texts_of([dialogue("q" * 10, "a" * 80)]).beside.any()
    assert not texts_of([dialogue("q" * 11, "a" * 80)]).beside.any()


def test_other_instructions_about_one_document_are_other_records():
    beside = texts_of([dialogue(asked, "yes", input="words " * 50) for asked in ("Is it long?", "Is it dull?")]).beside
    assert beside.all() and beside[0] != beside[1]


def test_a_call_may_end_with_a_stop_token_of_its_own():
    # gpt-oss ends a call with <|call|>; once, every record of an agent was reported as not stopping.
    table = as_table([(Example((1, 3, STOP), (0, 1, 1), "a:1"),), (Example((1, 3, 5), (0, 1, 1), "a:2"),)])
    assert read_tokens([table], stops=[STOP, 5], unknown=None).no_stop.tolist() == [False, False]


def test_records_conflict_only_if_the_whole_prompt_is_the_same():
    # A text that is trained as a whole answers nothing; other documents, tools or calls make it another question.
    question, answers = Turn("user", "q"), [Turn("assistant", "a"), Turn("assistant", "b")]
    called = [Turn("assistant", "", calls=({"name": name, "arguments": {}},)) for name in "fg"]
    kinds = {
        "texts": [Record((Turn("text", answer.text),), "a:1") for answer in answers],
        "roles": [
            Record((Turn(role, "r"), question, a), "a:1") for role, a in zip(("system", "user"), answers, strict=True)
        ],
        "tools": [Record((question, a), "a:1", tools=({"name": a.text},)) for a in answers],
        "documents": [Record((question, a), "a:1", variables={"documents": [a.text]}) for a in answers],
        "calls": [
            Record((question, call, Turn("tool", "5"), a), "a:1") for call, a in zip(called, answers, strict=True)
        ],
    }
    table = as_table([(Example((1, 3 + n, STOP), (0, 1, 1), "a:1"),) for n in range(2)])
    for kind, records in kinds.items():
        assert problems(records, [table])[0]["conflicts"].count == 0, kind
    same = [Record((question, a), "a:1", tools=({"name": "f"},)) for a in answers]
    assert problems(same, [table])[0]["conflicts"].count == 2


def test_findings_are_computed_if_every_record_was_refused():
    ledger = Ledger(records_read=1, records_refused=[Refusal("a:1", "why", RefusalKind.UNREADABLE)])
    found, *_ = problems([], [], ledger)
    assert {name: one.count for name, one in found.items() if one.count} == {"refused": 1}


def test_the_112_copies_of_the_dialogues_are_found():
    if not SHARED_DATA.is_file():
        pytest.skip("the dialogues' file is not here")
    values = [json.loads(line) for line in SHARED_DATA.read_text(encoding="utf-8").splitlines()]
    records = [dialogue(one["instruction"], one["output"], f"a:{i}") for i, one in enumerate(values)]
    texts = texts_of(records)
    equal = Counter((one["instruction"], one["output"]) for one in values)
    assert len(values) - len(equal) == 112
    groups = len(set(texts.near.tolist()))
    assert 112 <= len(values) - groups < 130  # all equal records are near duplicates, and few others are
