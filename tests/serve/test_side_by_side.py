"""Side by side: the tuned model and its base in one conversation, each with its own earlier answers."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from atomtune import load
from atomtune.errors import BadSettings
from atomtune.serve.side_by_side import Asking, ShownExchange, answers_of_sides, conversation_of, models_by_mode


@pytest.fixture(scope="module")
def tuned(by_heart):
    return load(by_heart, dtype="float32")


def last(
    tuned, question: str, *, before: Sequence[ShownExchange] = (), stop=lambda: False, **settings
) -> ShownExchange:
    *_, exchange = answers_of_sides(tuned, before, question, Asking(**settings), stop=stop)
    return exchange


def test_the_answer_streams_in_pieces_and_ends_as_in_chat(tuned):
    exchanges = list(answers_of_sides(tuned, [], "晚安", Asking(), stop=lambda: False))
    texts = [exchange.tuned.text for exchange in exchanges]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert len(set(texts)) > 3, "it came in pieces"
    assert exchanges[-1].tuned.shown == tuned.chat("晚安") == "晚安，愿你好梦。"
    assert exchanges[-1].base is None


def test_the_base_answers_beside_the_tuned_model_as_when_alone(tuned):
    exchange = last(tuned, "晚安", compare=True, max_new_tokens=12)
    alone = tuned.reply(tuned.messages_of("晚安"), base=True, max_new_tokens=12)
    assert exchange.base.reply.ids == alone.ids != exchange.tuned.reply.ids


def test_each_side_is_sent_its_own_earlier_answers_and_only_those(tuned):
    first = last(tuned, "晚安", compare=True, max_new_tokens=12)
    second = last(tuned, "你是谁？", before=[first], max_new_tokens=12)  # only the tuned model is asked
    sides = {side: conversation_of(tuned, [first, second], None, side=side).messages for side in ("tuned", "base")}
    assert [message["content"] for message in sides["tuned"]] == [
        "晚安",
        first.tuned.shown,
        "你是谁？",
        second.tuned.shown,
    ]
    assert [message["content"] for message in sides["base"]] == ["晚安", first.base.reply.turn.text]


def test_stopping_keeps_the_partial_answer_and_skips_the_base(tuned):
    whole = last(tuned, "讲一个很短的故事").tuned.text
    written: list[str] = []
    for exchange in answers_of_sides(
        tuned, [], "讲一个很短的故事", Asking(compare=True), stop=lambda: len(written) > 3
    ):
        written.append(exchange.tuned.text)
    assert 0 < len(exchange.tuned.text) < len(whole) and whole.startswith(exchange.tuned.text)
    assert exchange.tuned.reply is not None and exchange.base is None


def test_a_question_longer_than_the_model_has_positions_for_is_refused(tuned):
    with pytest.raises(BadSettings, match="positions"):
        last(tuned, "长" * (tuned.positions + 1))


def test_a_template_with_thinking_modes_is_rendered_in_both(tuned):
    assert models_by_mode(tuned) == {}
    source = tuned.template.source + "{% if enable_thinking is defined and not enable_thinking %}!{% endif %}"
    switched = tuned.with_template(replace(tuned.template, name="switched.jinja", source=source))
    modes = models_by_mode(switched)
    prompts = {thinks: mode.template.render(mode.messages_of("晚安")) for thinks, mode in modes.items()}
    assert prompts[False] == prompts[True] + "!"
    assert all(mode.model is tuned.model for mode in modes.values())
