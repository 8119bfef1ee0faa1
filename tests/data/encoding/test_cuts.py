"""Cuts: the pictures in cuts.py, on one template that is cut before headers and one that is cut before stop tokens."""

from dataclasses import replace

from atomtune.data.encoding.choose_template import load_template
from atomtune.data.encoding.cuts import AtHeaders, AtStops, Cuts, cuts_of, spot_checks, whole
from atomtune.data.encoding.templated_record import TemplatedRecord
from atomtune.data.records import Record, Turn
from tests.tiny import CHATML, tokenizer_of

TURNS = tuple(turn for n in (1, 2, 3) for turn in (Turn("user", f"q{n}"), Turn("assistant", f"a{n}")))
LEARNED = (1, 3, 5)


def cuts(name: str, kind: str, own: str | None = None) -> Cuts:
    template = load_template(name, tokenizer_of(kind, own))
    return cuts_of(TemplatedRecord(template, Record(TURNS, "a:1")))


def test_cuts_before_headers_match_the_documented_example():
    at_headers = cuts("chatml", "bytes", CHATML)
    assert isinstance(at_headers, AtHeaders)
    last = at_headers.prompt(5)
    first, second, third = at_headers.prompts_in(last, LEARNED)
    user, assistant, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
    assert last.history == [
        f"{user}q1{end}",
        f"{assistant}a1{end}{user}q2{end}",
        f"{assistant}a2{end}{user}q3{end}",
    ]
    assert third == last and last.asks == assistant
    assert [prompt.length for prompt in (first, second, third)] == [1, 2, 3]
    assert first.history is second.history is third.history
    assert at_headers.answer_in(second) == ("a2", "<|im_end|>")


def test_an_answer_ends_at_the_first_of_the_stop_tokens():
    # gpt-oss ends an answer with one token and a call with another, and later turns may contain either.
    template = replace(load_template("chatml", tokenizer_of("bytes", CHATML)), stops=("<|im_start|>", "<|im_end|>"))
    at_headers = cuts_of(TemplatedRecord(template, Record(TURNS, "a:1")))
    _, second, _ = at_headers.prompts_in(at_headers.prompt(5), LEARNED)
    assert at_headers.answer_in(second) == ("a2", "<|im_end|>")


def test_cuts_before_stop_tokens_match_the_documented_example():
    at_stops = cuts("mistral-v1", "sentencepiece")
    assert isinstance(at_stops, AtStops)
    last = at_stops.prompt(5)
    first, second, third = at_stops.prompts_in(last, LEARNED)
    assert last.history == ["<s> [INST] q1 [/INST] a1", "</s> [INST] q2 [/INST] a2"]
    assert third == last and last.asks == "</s> [INST] q3 [/INST]"
    assert whole(first) == "<s> [INST] q1 [/INST]"
    assert whole(second) == "<s> [INST] q1 [/INST] a1</s> [INST] q2 [/INST]"
    assert first.history is second.history is third.history
    assert at_stops.answer_in(second) == (" a2", "</s>")


def test_an_answer_that_begins_with_white_space_begins_at_that_white_space():
    template = load_template("mistral-v1", tokenizer_of("sentencepiece"))
    for texts in (("a1", "a2", "  a3"), ("a1", "\n\na2", "a3"), (" a1", "a2", " a3")):
        turns = tuple(turn for text in (*texts, "a4") for turn in (Turn("user", "q"), Turn("assistant", text)))
        templated = TemplatedRecord(template, Record(turns, "a:1"))
        at_stops = cuts_of(templated)
        assert isinstance(at_stops, AtStops)
        prompts = at_stops.prompts_in(at_stops.prompt(7), (1, 3, 5, 7))
        assert [whole(prompt) for prompt in prompts] == [templated.prompt_text(at) for at in (1, 3, 5, 7)]


def test_calls_that_a_template_leaves_out_are_not_looked_for_in_the_question():
    leaves_out = "{% for m in messages %}{{ m['content'] }}{{ '</s>' if m['role'] == 'assistant' }}{% endfor %}"
    template = load_template("auto", tokenizer_of("sentencepiece", leaves_out))
    calls = ({"name": "search", "arguments": {}},)
    turns = (*TURNS[:2], Turn("user", "search it"), Turn("assistant", "", calls=calls), *TURNS[4:])
    at_stops = cuts_of(TemplatedRecord(template, Record(turns, "a:1")))
    assert isinstance(at_stops, AtStops)
    assert at_stops.prompts_in(at_stops.prompt(5), LEARNED) is None


def test_a_rendering_whose_parts_do_not_match_the_turns_gives_no_prompts():
    # If a template writes an answer without its header, or joins two answers, their start cannot be found.
    joins = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.content != 'a1' %}")
    for at, parts in ((cuts("auto", "bytes", joins), 2), (cuts("auto", "bytes", CHATML), 3)):
        last = at.prompt(5)
        assert last.length == parts
        assert (at.prompts_in(last, LEARNED) is None) == (parts == 2)


def test_a_template_without_a_cut_mark_is_not_cut():
    # For example because the two sides of a cut would not tokenize to the ids of the whole.
    template = replace(load_template("auto", tokenizer_of("bytes", CHATML)), cut="")
    uncut = cuts_of(TemplatedRecord(template, Record(TURNS, "a:1")))
    last = uncut.prompt(5)
    assert (last.history, last.length) == ([], 0)
    assert uncut.prompts_in(last, LEARNED) is None and uncut.answer_in(last) is None


def test_spot_checks_double_their_distance():
    assert list(spot_checks([])) == []
    assert list(spot_checks(range(100, 110))) == [100, 101, 103, 107]
