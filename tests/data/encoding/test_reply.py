"""Replies: parsing the ids that training learned for a turn gives the turn."""

from itertools import pairwise

import pytest

from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.encoding.exchanges import exchanges_of
from atomtune.data.encoding.reply import read_reply, shown
from atomtune.data.records import Record, Turn
from benchmarks.token_truth import TOKENIZERS, template_for
from tests.tiny import CHATML, GEMMA, tokenizer_of
from tests.walk.test_token_truth import CHANNELS, OPENS, TRIMS, shaped

ASKED = Turn("user", "9*8?")
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
ANSWERS = {
    "plain": Turn("assistant", "Seventy-two."),
    "several lines": Turn("assistant", "7\n\n2  and\n more"),
    "control strings": Turn("assistant", "The token <|im_end|> or </s> ends it."),
    "thoughts": Turn("assistant", "72", reasoning="Nine times eight.\nThat is 72."),
}


def template_of(name: str) -> Template:
    shapes = {
        "channels": CHANNELS,
        "opens": OPENS.replace("SPACED", "<think>\n"),
        "opens close by": OPENS.replace("SPACED", "<think>"),
        "trims": TRIMS,
        "a space": CHATML.replace("{{ m['content'] }}", "{{ ' ' + m['content'] }}"),
    }
    if name in shapes:
        return shaped(shapes[name])
    if name in ("qwen3", "qwen2.5", "chatml"):
        return load_template(name, tokenizer_of("bytes", CHATML))
    return load_template(name, tokenizer_of("sentencepiece", GEMMA))


def written(template: Template, record: Record) -> list[int]:
    """The ids that training learned for the last turn, its stop token included."""
    exchange = exchanges_of(template, record)[-1]
    (ids,) = template.tokens.ids_of([exchange.answer])
    return [*ids, template.tokenizer.convert_tokens_to_ids(exchange.stop)]


def prompt_of(template: Template, record: Record) -> str:
    return template.render(template.messages(record.prompt), tools=record.tools)


NAMES = [
    "channels",
    "opens",
    "opens close by",
    "trims",
    "a space",
    "qwen3",
    "qwen2.5",
    "chatml",
    "auto",
    "atom",
    "mistral-v1",
    "mistral-v3",
    "plain",
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", NAMES)
def test_learned_answer_ids_are_parsed_back_to_the_same_turn(name, answer):
    # Catches `analysis…assistantfinal72`, thoughts without their tags, and a history that gets a space more each turn.
    template, turn = template_of(name), ANSWERS[answer]
    record = Record((ASKED, turn), "a:1")
    if turn.reasoning and not template.knows_thoughts:
        pytest.skip("this template writes no thoughts")
    assert read_reply(template, prompt_of(template, record), written(template, record)) == turn


@pytest.mark.parametrize("name", NAMES)
def test_the_next_prompt_after_a_parsed_reply_matches_the_record(name):
    # The history that chat sends is the one that training saw.
    template = template_of(name)
    turn = ANSWERS["thoughts" if template.knows_thoughts else "plain"]
    record = Record((ASKED, turn), "a:1")
    reply = read_reply(template, prompt_of(template, record), written(template, record))
    nexts = [template.render(template.messages([ASKED, answer, ASKED])) for answer in (turn, reply)]
    assert nexts[0] == nexts[1]


@pytest.mark.parametrize(
    ("name", "reasoning"), [("qwen2.5", ""), ("qwen3", ""), ("qwen3", "I need it."), ("channels", "I need it.")]
)
def test_learned_tool_calls_are_parsed_back_to_the_same_calls(name, reasoning):
    turn = Turn("assistant", "", reasoning=reasoning, calls=({"name": "add", "arguments": {"x": "两", "y": 3}},))
    template = template_of(name)
    record = Record((ASKED, turn), "a:1", tools=(TOOL,))
    assert read_reply(template, prompt_of(template, record), written(template, record)) == turn


def test_an_answer_cut_off_within_its_reasoning_has_no_text():
    template = template_of("opens")
    ids = template.tokenizer("Nine times", add_special_tokens=False)["input_ids"]
    assert read_reply(template, "…<think>\n", ids) == Turn("assistant", "", reasoning="Nine times")


def test_streamed_output_hides_headers_and_never_retracts_text():
    # Catches `analysis` and `assistantfinal` on the screen; a stream cannot take anything back.
    template = template_of("channels")
    record = Record((ASKED, ANSWERS["thoughts"]), "a:1")
    ids = written(template, record)
    stages = [shown(template, ids[:end]) for end in range(len(ids) + 1)]
    assert stages[-1] == "Nine times eight.\nThat is 72.\n\n72"
    assert all(later.startswith(earlier) for earlier, later in pairwise(stages))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_answers_are_parsed_back_with_published_tokenizers(name, real):
    real(TOKENIZERS[name][0])
    template = template_for(name)
    if template is None:
        pytest.skip("its published template comes with trl")
    for turn in ANSWERS.values():
        if turn.reasoning and not template.knows_thoughts:
            continue
        record = Record((ASKED, turn), "a:1")
        ids = written(template, record)
        assert read_reply(template, prompt_of(template, record), ids) == turn
        assert shown(template, ids).rstrip().endswith(turn.text)
