"""Laws of the prompts that certify sends to an engine."""

import pytest

from atomtune.certify.prompts import KINDS, OWN, choose_prompts, kind_of
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.records import Record, Turn
from atomtune.errors import BadData
from atomtune.model.generate import prompt_ids
from tests.tiny import CHATML, GEMMA, tokenizer_of
from tests.trained import WEATHER


def records() -> list[Record]:
    asked, answered = Turn("user", "Who are you?"), Turn("assistant", "I keep the light.")
    return [
        Record((asked, answered), "a:1"),
        Record((asked, answered), "a:2"),
        Record((asked, answered, Turn("user", "Good night."), answered), "a:3"),
        Record((Turn("system", "Be brief."), asked, answered), "a:4"),
        Record((Turn("user", "你是谁？"), answered), "a:5"),
        Record((Turn("user", "What is <|im_end|>?"), answered), "a:6"),  # a control string in some tokenizers
        Record((Turn("text", "A text."),), "a:7"),
        Record((asked, Turn("assistant", "I sleep.", learn=0)), "a:8"),
    ]


@pytest.fixture
def template():
    return load_template("auto", tokenizer_of("bytes", CHATML))


def test_every_prompt_kind_is_chosen_once_before_any_repeats(template):
    prompts = choose_prompts(records(), template, count=7, max_tokens=256)
    kinds = [prompt.kind for prompt in prompts]
    assert set(KINDS) - {"tools"} == set(kinds[:5])
    assert {prompt.origin for prompt in prompts if prompt.reference_ids} == {"a:1", "a:2", "a:3", "a:4", "a:5"}
    assert "our own" in {prompt.origin for prompt in prompts if prompt.kind == "look-alike"}
    of_records = {prompt.origin: prompt.kind for prompt in prompts if prompt.reference_ids}
    kinds = {"a:1": "one turn", "a:2": "one turn", "a:3": "several turns", "a:4": "system", "a:5": "Chinese"}
    assert of_records == kinds


def test_prompt_ids_match_training_and_references_end_with_the_stop_token(template):
    for prompt in choose_prompts(records(), template, count=20, max_tokens=256):
        assert list(prompt.prompt_ids) == prompt_ids(template, list(prompt.request.messages))
        if prompt.reference_ids:
            assert prompt.reference_ids[-1] == template.tokenizer.convert_tokens_to_ids(template.stop)


def test_a_record_with_a_real_control_string_is_left_out(template):
    assert not [p for p in choose_prompts(records(), template, count=20, max_tokens=256) if p.origin == "a:6"]


def test_messages_that_the_template_cannot_express_are_left_out():
    template = load_template("auto", tokenizer_of("sentencepiece", GEMMA))  # it raises an error for a system text
    prompts = choose_prompts([], template, count=20, max_tokens=256)
    assert [prompt.kind for prompt in prompts] == [kind for kind, _ in OWN if kind != "system"]


def test_our_own_prompts_leave_room_for_an_answer_among_the_bases_positions(template):
    # A template with a long text of its own made them longer than the base, which then answered nothing.
    every = choose_prompts([], template, count=20, max_tokens=256)
    longest = max(len(prompt.prompt_ids) for prompt in every)
    within = choose_prompts([], template, count=20, max_tokens=256, positions=longest)
    assert within == [prompt for prompt in every if len(prompt.prompt_ids) < longest]
    with pytest.raises(BadData, match="leaves no room for one among the base's positions"):
        choose_prompts([], template, count=20, max_tokens=256, positions=5)


def test_the_look_alike_prompt_contains_no_real_control_string():
    (messages,) = [messages for kind, messages in OWN if kind == "look-alike"]
    assert kind_of(messages, ()) == "look-alike"
    for control in ("</s>", "<s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "[INST]", "<|endoftext|>"):
        assert control not in messages[0]["content"]


def test_requests_carry_run_variables_overridden_by_record_variables():
    # Catches an engine that thinks in a record that was trained without thinking.
    template = load_template("qwen3", tokenizer_of("bytes", CHATML), variables={"enable_thinking": True, "mine": 1})
    record = Record((Turn("user", "Who?"), Turn("assistant", "I.")), "a:1", variables={"enable_thinking": False})
    (prompt, *_) = choose_prompts([record], template, count=1, max_tokens=256)
    assert prompt.request.variables == {"enable_thinking": False, "mine": 1}
    asked = template.render(prompt.request.messages, variables=prompt.request.variables)
    assert list(prompt.prompt_ids) == template.tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert asked.endswith("</think>\n\n")


def test_a_record_with_tools_is_asked_with_its_tools_as_in_training():
    template = load_template("qwen3", tokenizer_of("bytes", CHATML))
    tools = (WEATHER,)
    record = Record((Turn("user", "Will it rain?"), Turn("assistant", "Yes.")), "a:1", tools=tools)
    (prompt, *_) = choose_prompts([record], template, count=1, max_tokens=1000)
    assert (prompt.kind, prompt.request.tools) == ("tools", tools)
    asked = template.render(prompt.request.messages, tools=tools)
    assert "weather" in asked
    assert list(prompt.prompt_ids) == template.tokenizer(asked, add_special_tokens=False)["input_ids"]


def test_a_record_is_asked_up_to_the_longest_example_of_training(template):
    (prompt,) = choose_prompts(records()[:1], template, count=1, max_tokens=256)
    longest = len(prompt.prompt_ids) + len(prompt.reference_ids)
    for max_tokens, is_asked in ((longest, True), (longest - 1, False)):
        (first,) = choose_prompts(records()[:1], template, count=1, max_tokens=max_tokens)
        assert (first.origin == "a:1") is is_asked
