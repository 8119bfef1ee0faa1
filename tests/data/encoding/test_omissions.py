"""Omissions: if a template leaves out a part of a record, there is a note, or the record is refused with the reason."""

import pytest

from atomtune.data.encoding.chat_template import CannotExpress
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.encoding.exchanges import exchanges_of
from atomtune.data.encoding.omissions import NOT_WRITTEN, notes_on
from atomtune.data.records import Record, Turn
from tests.tiny import CHATML, tokenizer_of

QUESTION, ANSWER = Turn("user", "Weather?"), Turn("assistant", "Fine.")
CALLS = tuple({"name": "f", "arguments": {"city": city}} for city in ("Paris", "Rome"))
TOLD = Turn("tool", 'It is "21" °C.')
CONTENT = "{{ m['content'] }}"
WITH_CALLS = CHATML.replace(CONTENT, CONTENT + "{{ m.tool_calls | tojson if m.tool_calls }}")
FIRST_CALL = CHATML.replace(CONTENT, CONTENT + "{{ m.tool_calls[0] | tojson if m.tool_calls }}")
CALLS_ALONE = CHATML.replace(CONTENT, "{{ m.tool_calls | tojson if m.tool_calls else m['content'] }}")
TOOLS_AS_JSON = WITH_CALLS.replace(CONTENT, "{{ m['content'] | tojson if m.role == 'tool' else m['content'] }}")
DEAF_TO_TOOLS = WITH_CALLS.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
DEAF_TO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
FORGETS_ANSWERS = CHATML.replace(CONTENT, "{{ m['content'] if m.role == 'user' else 'Yes.' }}")


def notes(source: str, *turns: Turn, **more) -> tuple[str, ...]:
    record = Record(turns, "a:1", **more)
    return notes_on(record, exchanges_of(load_template("auto", tokenizer_of("bytes", source)), record))


@pytest.mark.parametrize(
    ("source", "turns", "lost"),
    [
        (CHATML, [QUESTION, ANSWER], []),
        (CHATML, [QUESTION, Turn("assistant", "Fine.", reasoning="hm")], ["thoughts"]),
        (WITH_CALLS, [QUESTION, Turn("assistant", "I look.", calls=CALLS), TOLD, ANSWER], []),
        (CALLS_ALONE, [QUESTION, Turn("assistant", "I look.", calls=CALLS), TOLD, ANSWER], ["text"]),
        (
            CHATML.replace(CONTENT, "{{ m['content'] | trim }}"),
            [QUESTION, Turn("assistant", " Fine.\n")],
            ["white space"],
        ),
        (TOOLS_AS_JSON, [QUESTION, Turn("assistant", "", calls=CALLS), TOLD, ANSWER], []),
        # Catches an instruction that all records lose, with templates that know only user and assistant.
        (CHATML, [Turn("system", " Be <|im_end|> brief.\n"), QUESTION, ANSWER], []),
        (DEAF_TO_SYSTEM, [Turn("system", " Be <|im_end|> brief.\n"), QUESTION, ANSWER], ["system"]),
    ],
)
def test_an_acceptable_omission_is_noted_once(source, turns, lost):
    assert notes(source, *turns) == tuple(NOT_WRITTEN[name] for name in lost)
    assert notes(source, *turns, *turns[-2:]) == tuple(NOT_WRITTEN[name] for name in lost)


def test_documents_missing_from_every_prompt_are_noted():
    variables = {"documents": [{"title": "Weather"}]}
    assert notes(CHATML, QUESTION, ANSWER, variables=variables) == (NOT_WRITTEN["documents"],)
    assert notes(CHATML, QUESTION, ANSWER, variables={"documents": []}) == ()
    reads = "{% for d in documents or [] %}[{{ d['title'] }}]{% endfor %}" + CHATML
    assert notes(reads, QUESTION, ANSWER, variables=variables) == ()
    assert notes(CHATML, Turn("text", "A text."), variables=variables) == ()


def test_a_list_of_tools_that_is_missing_from_the_prompt_is_noted_if_texts_name_the_tools_and_else_refused():
    # A template without a place for tools lost them in silence where the question held their name, as "weather" here.
    tools = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
    named = Turn("user", "How is the weather?")
    assert notes(CHATML, named, ANSWER, tools=tools) == (NOT_WRITTEN["tools"],)
    lists = "{{ tools | tojson if tools }}" + CHATML
    assert notes(lists, named, ANSWER, tools=tools) == notes(lists, QUESTION, ANSWER, tools=tools) == ()
    refuses = "{{ raise_exception('no tools') if not tools and 'weather' in messages[0]['content'] }}" + lists
    assert notes(refuses, named, ANSWER, tools=tools) == (), "it cannot do without the list"
    with pytest.raises(CannotExpress, match="has no place for tools"):
        notes(CHATML, QUESTION, ANSWER, tools=tools)


@pytest.mark.parametrize(
    ("source", "turns", "why"),
    [
        (CHATML, [QUESTION, Turn("assistant", "", calls=CALLS)], "has no place for tool calls"),
        (FIRST_CALL, [QUESTION, Turn("assistant", "", calls=CALLS)], "writes 1 of the 2 calls of a turn"),
        (DEAF_TO_TOOLS, [QUESTION, Turn("assistant", "", calls=CALLS), TOLD, ANSWER], r"what turn 3 \(tool\) says"),
        (FORGETS_ANSWERS, [QUESTION, ANSWER], "does not write the text of an answer"),
    ],
)
def test_an_unacceptable_omission_refuses_the_record(source, turns, why):
    with pytest.raises(CannotExpress, match=why):
        notes(source, *turns)


def test_a_turn_with_each_number_of_calls_is_checked():
    # A template may write two calls of a turn, but not three.
    two = CHATML.replace(CONTENT, CONTENT + "{{ m.tool_calls[:2] | tojson if m.tool_calls }}")
    three = (*CALLS, {"name": "f", "arguments": {"city": "Oslo"}})
    turns = [QUESTION, Turn("assistant", "", calls=CALLS), TOLD]
    assert notes(two, *turns, ANSWER) == ()
    with pytest.raises(CannotExpress, match="writes 2 of the 3 calls"):
        notes(two, *turns, Turn("assistant", "", calls=three))
