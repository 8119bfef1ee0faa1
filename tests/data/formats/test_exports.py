"""Conversations as other services export them: Gemini's tuning records, ChatGPT's conversations.json."""

import pytest

from atomtune.data.formats.detect import detect_schema, to_record
from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import Record, Refusal


def read(*values: dict):
    schema = detect_schema(values, name="export.json")
    return [to_record(RawRecord(value, f"export.json:{n}"), schema) for n, value in enumerate(values, 1)]


def turns(parsed) -> list[tuple[str, str]]:
    assert isinstance(parsed.outcome, Record), parsed.outcome
    return [(turn.role, turn.text) for turn in parsed.outcome.turns]


def said(role: str, *texts: str) -> dict:
    return {"role": role, "parts": [{"text": text} for text in texts]}


def test_a_gemini_tuning_record_is_read_as_messages():
    value = {
        "systemInstruction": said("system", "Answer like a sailor."),
        "contents": [
            said("user", "Who ", "are you?"),
            said("model", "Aye."),
            said("user", "Sure?"),
            said("model", "Aye!"),
        ],
    }
    (parsed,) = read(value)
    assert turns(parsed) == [
        ("system", "Answer like a sailor."),
        *(("user", "Who are you?"), ("assistant", "Aye."), ("user", "Sure?"), ("assistant", "Aye!")),
    ]
    assert '"contents" (Gemini) is read as messages' in parsed.notes


def test_gemini_function_calls_and_declarations_are_read():
    declared = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    call = {"functionCall": {"name": "weather", "args": {"city": "x"}}}
    answer = {"functionResponse": {"name": "weather", "response": {"sky": "grey"}}}
    value = {
        "tools": [{"functionDeclarations": [declared]}],
        "contents": [
            said("user", "Weather?"),
            {"role": "model", "parts": [{"text": "I look.", "thought": True}, call]},
            {"role": "user", "parts": [answer]},
            said("model", "Grey."),
        ],
    }
    (parsed,) = read(value)
    assert turns(parsed)[2:] == [("tool", '{"sky": "grey"}'), ("assistant", "Grey.")]
    calling = parsed.outcome.turns[1]
    assert calling.reasoning == "I look."
    assert [(one["name"], one["arguments"]) for one in calling.calls] == [("weather", {"city": "x"})]
    assert parsed.outcome.turns[2].name == "weather"
    assert parsed.outcome.tools[0]["function"] == declared


@pytest.mark.parametrize("key", ["systemInstruction", "system_instruction"])
@pytest.mark.parametrize("text", ["Answer like a sailor.", ""])
@pytest.mark.parametrize(
    "form",
    [
        lambda text: text,
        lambda text: {"text": text},
        lambda text: [text],
        lambda text: [{"text": text}],
        lambda text: {"parts": [{"text": text}]},
        lambda text: {"parts": text},
    ],
    ids=["text", "part", "texts", "parts", "content", "content of a text"],
)
def test_a_gemini_system_instruction_is_read_in_every_form(key, text, form):
    # Google's clients accept all of these. Only the last two were read; the others were silently left out.
    (parsed,) = read({key: form(text), "contents": [said("user", "a"), said("model", "b")]})
    assert turns(parsed) == [("system", text), ("user", "a"), ("assistant", "b")]


def test_a_gemini_system_instruction_that_is_no_text_is_refused():
    good, refused = (
        {"contents": [said("user", "a"), said("model", "b")], **system} for system in ({}, {"systemInstruction": 3})
    )
    _, refused = read(good, refused)
    assert isinstance(refused.outcome, Refusal)


def test_ids_of_gemini_function_calls_are_kept():
    call = {"functionCall": {"id": "call-1", "name": "weather", "args": {}}}
    answer = {"functionResponse": {"id": "call-1", "name": "weather", "response": "grey"}}
    contents = [said("user", "Weather?"), {"role": "model", "parts": [call]}, {"role": "user", "parts": [answer]}]
    (parsed,) = read({"contents": [*contents, said("model", "Grey.")]})
    asked, told = parsed.outcome.turns[1:3]
    assert [one["id"] for one in asked.calls] == ["call-1"] == [told.call_id]
    assert (told.name, told.text) == ("weather", "grey")
    assert parsed.notes == ('"contents" (Gemini) is read as messages',)


def test_a_gemini_file_part_is_refused_by_its_type():
    with_file = {
        "contents": [{"role": "user", "parts": [{"fileData": {"fileUri": "gs://x"}}]}, said("model", "A cat.")]
    }
    good, refused = read({"contents": [said("user", "a"), said("model", "b")]}, with_file)
    assert isinstance(good.outcome, Record) and isinstance(refused.outcome, Refusal)
    assert 'a part of type "fileData"; only text can be trained on' in refused.outcome.reason


def node(parent: str | None, role: str, *parts: object, kind: str = "text", recipient: str = "all") -> dict:
    content = {"content_type": kind, "parts": list(parts)}
    return {"parent": parent, "message": {"author": {"role": role}, "recipient": recipient, "content": content}}


EXPORT = {
    "title": "A lighthouse",
    "current_node": "sure",
    "mapping": {
        "root": {"parent": None, "message": None},
        "hidden": node("root", "system", ""),
        "asked": node("hidden", "user", "Who are you?"),
        "replaced": node("asked", "assistant", "I do not know."),
        "search": node("asked", "assistant", "search(me)", recipient="browser"),
        "found": node("search", "tool", "a page"),
        "answer": node("found", "assistant", "I keep the light."),
        "again": node("answer", "user", "Sure?"),
        "sure": node("again", "assistant", "Yes."),
    },
}


def test_a_chatgpt_export_is_read_along_the_path_to_its_current_node():
    (parsed,) = read(EXPORT)
    assert turns(parsed) == [
        *(("user", "Who are you?"), ("assistant", "I keep the light.")),
        *(("user", "Sure?"), ("assistant", "Yes.")),
    ]
    assert [note for note in parsed.notes if "left out" in note], "the search is not lost in silence"


def test_a_chatgpt_export_without_tool_use_has_no_left_out_notice():
    mapping = {name: EXPORT["mapping"][name] for name in ("root", "hidden", "asked")}
    mapping["answer"] = node("asked", "assistant", "I keep the light.")
    (parsed,) = read({"mapping": mapping, "current_node": "answer"})
    assert len(turns(parsed)) == 2
    assert parsed.notes == ('"mapping" (an export of ChatGPT) is read as messages',)


def test_an_image_in_a_chatgpt_export_refuses_its_conversation():
    mapping = {**EXPORT["mapping"], "asked": node("hidden", "user", {"content_type": "image_asset_pointer"}, "What?")}
    (parsed,) = read({**EXPORT, "mapping": mapping})
    assert 'a part of type "image_asset_pointer"' in parsed.outcome.reason


@pytest.mark.parametrize("change", [{"current_node": "nowhere"}, {"current_node": []}, {"mapping": []}])
def test_a_broken_chatgpt_export_is_refused_without_a_traceback(change):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    _, refused = read(good, {**EXPORT, **change})
    assert isinstance(refused.outcome, Refusal)


@pytest.mark.parametrize(
    "content", [None, [], {"content_type": [], "parts": ["a"]}, {"content_type": "text", "parts": "a"}]
)
@pytest.mark.parametrize("author", [None, "user", {"role": 3}])
def test_any_value_in_an_export_is_read_or_refused(content, author):
    torn = {"parent": None, "message": {"author": author, "content": content}}
    read(
        {"mapping": {"a": torn}, "current_node": "a"}, {"contents": [{"parts": [3, None, {}, {"text": 3}], "role": []}]}
    )


def test_a_cycle_in_a_chatgpt_export_is_read_only_once():
    mapping = {"a": node("b", "user", "a?"), "b": node("a", "assistant", "b.")}
    (parsed,) = read({"mapping": mapping, "current_node": "b"})
    assert turns(parsed) == [("user", "a?"), ("assistant", "b.")]
