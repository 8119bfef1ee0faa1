"""Templated record: a record's messages, the rendered prompt before an answer, and the answer after it."""

import pytest

from atomtune.data.encoding.chat_template import CannotExpress, Template
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.encoding.templated_record import TemplatedRecord
from atomtune.data.records import Record, Turn
from tests.tiny import CHATML, tokenizer_of

QUESTION = Turn("user", "9*8?")
#: Writes an answer's thoughts while it is the last turn, and leaves them out later.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nASKS{% endif %}"
)


def template_of(source: str) -> Template:
    return load_template("auto", tokenizer_of("bytes", source))


def prompt_and_answer(source: str, *turns: Turn) -> tuple[str, str]:
    """The rendered prompt and answer of the last turn."""
    templated = TemplatedRecord(template_of(source), Record(turns, "a:1"))
    prompt = templated.prompt_text(len(turns) - 1)
    return prompt, templated.answer_text(len(turns) - 1, prompt)


def test_messages_are_found_by_their_turn():
    # One turn has two messages, so the indices of turns and messages differ from there on.
    template = load_template("atom", tokenizer_of("sentencepiece"))
    turns = (Turn("user", "Translate.", input="dog"), Turn("assistant", "Hund"), Turn("user", "cat"))
    templated = TemplatedRecord(template, Record((*turns, Turn("assistant", "Katze")), "a:1"))
    assert [message["content"] for message in templated.messages_of(0)] == ["Translate.", "dog"]
    assert [message["content"] for message in templated.messages_before(2)] == ["Translate.", "dog", "Hund"]
    assert templated.message_of(1)["content"] == "Hund"
    assert [message["content"] for message in templated.messages_of(3)] == ["Katze"]
    assert templated.last_question(3) == 2 and templated.last_question(2) == 0


def test_prompt_plus_answer_equals_the_rendered_conversation():
    turns = (QUESTION, Turn("assistant", "72"), QUESTION, Turn("assistant", "It is 72."))
    prompt, answer = prompt_and_answer(CHATML, *turns)
    assert prompt.endswith("<|im_start|>assistant\n") and answer == "It is 72.<|im_end|>\n"
    template = template_of(CHATML)
    assert prompt + answer == template.render(template.messages(turns), prompt=False)


def test_an_answer_is_found_if_the_reasoning_before_it_was_dropped():
    # Once the second answer is there, the first loses its thoughts, so the rendering does not begin with the prompt.
    source = FORGETS.replace("ASKS", "")
    turns = (Turn("assistant", "72", reasoning="Nine times eight."), Turn("assistant", "It is 72."))
    prompt, answer = prompt_and_answer(source, QUESTION, *turns)
    assert "Nine times eight." in prompt
    assert answer == "It is 72.<|im_end|>\n"


@pytest.mark.parametrize(
    ("asks", "reasoning", "expected"),
    [
        ("<think>\\n", "Nine times eight.", "Nine times eight.\n</think>\n\n72<|im_end|>\n"),
        ("<think>\\n", "", "\n</think>\n\n72<|im_end|>\n"),
        ("<think>\\n\\n</think>\\n\\n", "Nine times eight.", "72<|im_end|>\n"),
    ],
)
def test_an_answer_continues_a_prompt_that_opens_or_closes_the_reasoning(asks, reasoning, expected):
    source = FORGETS.replace("ASKS", asks.replace("\\n", "\n"))
    assert prompt_and_answer(source, QUESTION, Turn("assistant", "72", reasoning=reasoning))[1] == expected


def test_an_answer_whose_beginning_cannot_be_found_refuses_the_record():
    counts = "<|im_start|>{{ messages | length }}" + CHATML
    with pytest.raises(CannotExpress, match="the beginning of the answer cannot be found"):
        prompt_and_answer(counts, QUESTION, Turn("assistant", "72"))
