"""Prompts: if they are cut out of one rendering, they equal prompts that are rendered one by one."""

from dataclasses import replace

import pytest

from atomtune.data.encoding import cuts
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.encoding.cuts import cuts_of, whole
from atomtune.data.encoding.prompts import prompts_of
from atomtune.data.encoding.templated_record import TemplatedRecord
from atomtune.data.records import Record, Turn
from tests.tiny import CHATML, tokenizer_of

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
CONTENT = "{{ m['content'] }}"
LAST_QUESTION = (
    "{% set last = namespace(question=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
)
PLAIN = "{{ tools | tojson if tools }}" + CHATML.replace(
    CONTENT, CONTENT + "{{ m.tool_calls | tojson if m.tool_calls }}"
)
#: Like Qwen3's: after the last question, an answer keeps its thoughts, even empty ones.
KEEPS_AFTER_QUESTION = LAST_QUESTION + PLAIN.replace(
    CONTENT,
    "{% if m.role == 'assistant' and loop.index0 > last.question %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}" + CONTENT,
)
#: Like Mistral's.
TOOLS_BEFORE_LAST_QUESTION = LAST_QUESTION + PLAIN.removeprefix("{{ tools | tojson if tools }}").replace(
    CONTENT, "{{ tools | tojson if tools and loop.index0 == last.question }}" + CONTENT
)

#: Like gpt-oss's: a call begins with a header of its own.
TWO_HEADERS = PLAIN.replace(CONTENT, CONTENT + "{{ '<|im_end|>\n<|im_start|>assistant\n' if m.tool_calls }}")


def conversation(questions: int, calls: int, *, thoughts: str = "") -> Record:
    turns = []
    for q in range(questions):
        turns.append(Turn("user", f"q{q}"))
        for c in range(calls):
            called = {"name": "f", "arguments": {"n": c}}
            turns += [Turn("assistant", "", calls=(called,), reasoning=thoughts), Turn("tool", f"t{q} {c}")]
        turns.append(Turn("assistant", f"a{q}", reasoning=thoughts))
    return Record(tuple(turns), "a:1", tools=(TOOL,) if calls else ())


def texts(template: Template, record: Record) -> list[str]:
    return list(map(whole, prompts_of(cuts_of(TemplatedRecord(template, record)), record.learned)))


@pytest.mark.parametrize("thoughts", ["", "hm"])
@pytest.mark.parametrize("calls", [0, 2, 7])
@pytest.mark.parametrize("source", [PLAIN, KEEPS_AFTER_QUESTION, TOOLS_BEFORE_LAST_QUESTION, TWO_HEADERS])
def test_every_prompt_equals_its_separate_rendering(source, calls, thoughts):
    template = load_template("auto", tokenizer_of("bytes", source))
    record = conversation(9, calls, thoughts=thoughts)
    templated = TemplatedRecord(template, record)
    assert texts(template, record) == [templated.prompt_text(at) for at in record.learned]


def test_few_prompts_are_rendered_and_many_are_cut_from_one_rendering(monkeypatch):
    template = load_template("auto", tokenizer_of("bytes", CHATML))
    rendered: list[int] = []
    render = Template.render

    def counted(self: Template, messages, **more) -> str:
        rendered.append(len(messages))
        return render(self, messages, **more)

    monkeypatch.setattr(Template, "render", counted)
    texts(template, conversation(cuts.RENDERED_EACH, 0))
    assert rendered == [1, 3, 5, 7]
    rendered.clear()
    texts(template, conversation(100, 0))
    # The last prompt, then the 1st, 2nd, 4th, … for comparison.
    assert rendered == [199, 1, 3, 7, 15, 31, 63, 127]


@pytest.mark.parametrize(("questions", "calls"), [(9, 0), (1, 9)])
@pytest.mark.parametrize("differs_at", ["messages | length < 4", "messages | length > 13"])
def test_prompts_that_vary_with_conversation_length_are_each_rendered(differs_at, questions, calls):
    source = f"<|im_start|>system\n{{{{ 'long' if {differs_at} else 'short' }}}}<|im_end|>\n{PLAIN}"
    template = load_template("auto", tokenizer_of("bytes", source))
    record = conversation(questions, calls)
    templated = TemplatedRecord(template, record)
    prompts = texts(template, record)
    assert prompts == [templated.prompt_text(at) for at in record.learned]
    assert {"long" in prompt for prompt in prompts} == {True, False}


def test_reasoning_kept_in_only_some_later_prompts_is_not_missed():
    # The fifth answer is between the compared prompts, and its thoughts are only in the next prompt.
    recent = "{{ m.reasoning_content if loop.index0 > messages | length - 3 }}"
    template = load_template("auto", tokenizer_of("bytes", PLAIN.replace(CONTENT, recent + CONTENT)))
    turns = list(conversation(9, 0).turns)
    turns[9] = replace(turns[9], reasoning="hm")
    record = Record(tuple(turns), "a:1")
    templated = TemplatedRecord(template, record)
    prompts = texts(template, record)
    assert prompts == [templated.prompt_text(at) for at in record.learned]
    assert ["hm" in prompt for prompt in prompts] == [number == 5 for number in range(9)]
