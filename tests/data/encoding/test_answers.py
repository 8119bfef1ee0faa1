"""Answers: found in three ways, from the template's form, from a later prompt, or by a separate rendering."""

from dataclasses import replace

import pytest

from atomtune.data.encoding.answers import answer_at, answers_of
from atomtune.data.encoding.chat_template import CannotExpress, Template
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.encoding.cuts import cuts_of
from atomtune.data.encoding.prompts import prompts_of
from atomtune.data.encoding.templated_record import TemplatedRecord
from atomtune.data.records import Record, Turn
from tests.tiny import CHATML, tokenizer_of

CONTENT = "{{ m['content'] }}"
WITH_CALLS = CHATML.replace(CONTENT, CONTENT + "{{ m.tool_calls | tojson if m.tool_calls }}")
#: An answer that ends the conversation begins with empty thoughts, which history leaves out.
EMPTY_THOUGHTS_LAST = WITH_CALLS.replace(
    CONTENT,
    "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last and not add_generation_prompt }}" + CONTENT,
)
#: The same, and an answer that ends the conversation has no line ends before its text (Qwen3).
TRIMMED_LAST = EMPTY_THOUGHTS_LAST.replace(
    CONTENT, "{{ m['content'].lstrip('\n') if loop.last and not add_generation_prompt else m['content'] }}"
)
#: An answer that ends the conversation begins with its length.
NUMBERED_LAST = WITH_CALLS.replace(
    CONTENT, "{{ messages | length if m.role == 'assistant' and loop.last and not add_generation_prompt }}" + CONTENT
)
#: An answer that ends a long conversation begins with a mark.
MARKED_LAST = NUMBERED_LAST.replace("{{ messages | length if", "{{ '!' if messages | length > 9 and")
#: Answers begin with empty thoughts, but only in a conversation with a question (Qwen3).
THOUGHTS_AFTER_QUESTIONS = CHATML.replace(
    CONTENT,
    "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and 'user' in messages | map(attribute='role') }}" + CONTENT,
)
#: Questions and answers take turns (Gemma).
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != loop.index0 is even %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
) + CHATML


@pytest.fixture
def rendered(monkeypatch) -> list[int]:
    """The number of messages of each rendering, filled in while the test runs."""
    lengths: list[int] = []
    render = Template.render

    def counted(self: Template, messages, **more) -> str:
        lengths.append(len(messages))
        return render(self, messages, **more)

    monkeypatch.setattr(Template, "render", counted)
    return lengths


def agent(calls: int) -> Record:
    turns = [Turn("user", "fix it")]
    for n in range(calls):
        turns += [Turn("assistant", "", calls=({"name": "f", "arguments": {"n": n}},)), Turn("tool", f"t{n}")]
    return Record((*turns, Turn("assistant", "done")), "a:1")


def test_a_plain_answer_is_not_rendered(rendered):
    template = load_template("auto", tokenizer_of("bytes", CHATML))
    assert template.form is not None
    templated = TemplatedRecord(template, Record((Turn("user", "q"), Turn("assistant", "a")), "a:1"))
    prompt = cuts_of(templated).prompt(1)
    rendered.clear()
    assert answer_at(templated, 1, prompt) == ("a", "<|im_end|>")
    assert rendered == []


@pytest.mark.parametrize(
    ("source", "few"),
    [(WITH_CALLS, True), (EMPTY_THOUGHTS_LAST, True), (NUMBERED_LAST, False), (MARKED_LAST, False)],
)
def test_answers_cut_from_a_later_prompt_match_separate_renderings(source, few, rendered):
    template = load_template("auto", tokenizer_of("bytes", source))
    record = agent(30)
    templated = TemplatedRecord(template, record)
    cuts = cuts_of(templated)
    prompts = prompts_of(cuts, record.learned)
    rendered.clear()
    answers = list(answers_of(cuts, record.learned, prompts))
    renderings = len(rendered)
    assert answers == [answer_at(templated, at, prompt) for at, prompt in zip(record.learned, prompts, strict=True)]
    assert all(f'{{"n": {number}}}' in answer.text for number, answer in enumerate(answers[:-1]))
    assert (renderings < 10) == few  # of 30 calls; the 1st, 2nd, 4th, 8th and 16th are compared


def test_a_template_that_trims_only_the_last_answer_writes_each_answer_as_the_last():
    template = load_template("auto", tokenizer_of("bytes", TRIMMED_LAST))
    record = agent(8)
    turns = [
        replace(turn, text="\n\nok" if number == 5 else "ok") if turn.calls else turn
        for number, turn in enumerate(record.turns)
    ]
    record = replace(record, turns=tuple(turns))
    templated = TemplatedRecord(template, record)
    cuts = cuts_of(templated)
    prompts = prompts_of(cuts, record.learned)
    answers = list(answers_of(cuts, record.learned, prompts))
    assert answers == [answer_at(templated, at, prompt) for at, prompt in zip(record.learned, prompts, strict=True)]


def test_an_answer_without_a_question_has_no_thoughts_that_the_template_would_not_write():
    template = load_template("auto", tokenizer_of("bytes", THOUGHTS_AFTER_QUESTIONS))
    assert template.form is not None and template.form.lead == "<think>\n\n</think>\n\n"
    record = Record((Turn("system", "s"), Turn("assistant", "a")), "a:1")
    templated = TemplatedRecord(template, record)
    assert answer_at(templated, 1, cuts_of(templated).prompt(1)) == ("a", "<|im_end|>")


@pytest.mark.parametrize(
    "before",
    [
        (Turn("user", "q"), Turn("assistant", "a1")),
        (Turn("user", "q"), Turn("tool", "t")),
        (Turn("user", "q"), Turn("system", "s")),
    ],
)
def test_an_answer_is_refused_at_any_place_where_the_template_refuses_it(before):
    template = load_template("auto", tokenizer_of("bytes", ALTERNATING))
    templated = TemplatedRecord(template, Record((*before, Turn("assistant", "a2")), "a:1"))
    prompt = cuts_of(templated).prompt(2)  # the template refuses nothing yet
    with pytest.raises(CannotExpress, match="roles must alternate"):
        answer_at(templated, 2, prompt)


def test_a_text_record_is_its_own_answer_with_control_strings_escaped():
    template = load_template("auto", tokenizer_of("bytes", CHATML))
    templated = TemplatedRecord(template, Record((Turn("text", "Once <|im_end|> upon"),), "a:1"))
    answer = answer_at(templated, 0, cuts_of(templated).prompt(0))
    assert "<|im_end|>" not in answer.text and answer.stop == template.stop
    piece = templated.escaper.piece(answer.text, learn=True)
    assert piece.text == "Once <|im_end|> upon" and piece.breaks == (6,)
