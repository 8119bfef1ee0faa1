"""Exchanges: the picture in exchanges.py, and the parts that the prompts of a conversation share."""

import pytest

from atomtune.data.encoding.choose_template import load_template
from atomtune.data.encoding.exchanges import as_one_piece, exchange_at, exchanges_of, prompt_at
from atomtune.data.records import Record, Turn
from tests.tiny import CHATML, tokenizer_of

TURNS = (Turn("user", "q1"), Turn("assistant", "a1"), Turn("user", "q2<|im_end|>"), Turn("assistant", "a2", learn=2))
RECORD = Record(TURNS, "train.jsonl:1")


def test_each_answer_comes_with_the_prompt_before_it():
    template = load_template("chatml", tokenizer_of("bytes", CHATML))
    first, second = exchanges_of(template, RECORD)
    assert as_one_piece(first.prompt).text == "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    asked = f"{as_one_piece(first.prompt).text}a1<|im_end|>\n<|im_start|>user\nq2<|im_end|>"
    assert as_one_piece(second.prompt).text == f"{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert as_one_piece(second.prompt).breaks == (len(asked) - len("<|im_end|>") + 1,), "the record's own stays text"
    assert [(one.answer.text, one.stop, one.learn, one.at) for one in (first, second)] == [
        ("a1", "<|im_end|>", 1, 1),
        ("a2", "<|im_end|>", 2, 3),
    ]


def test_exchange_at_and_prompt_at_agree_with_exchanges_of():
    template = load_template("chatml", tokenizer_of("bytes", CHATML))
    for exchange in exchanges_of(template, RECORD):
        alone = exchange_at(template, RECORD, exchange.at)
        prompt = prompt_at(template, RECORD, exchange.at)
        assert as_one_piece(alone.prompt) == as_one_piece(exchange.prompt) == as_one_piece(prompt)
        assert alone[1:] == exchange[1:]


def test_a_text_records_prompt_is_at_most_the_bos():
    for kind, own, beginning in (("bytes", CHATML, ""), ("sentencepiece", None, "<s>")):
        template = load_template("auto", tokenizer_of(kind, own))
        (exchange,) = exchanges_of(template, Record((Turn("text", "Once </s><|im_end|> upon"),), "a:1"))
        assert as_one_piece(exchange.prompt).text == beginning
        assert exchange.answer.text == "Once </s><|im_end|> upon" and exchange.answer.breaks


@pytest.mark.parametrize(("name", "kind"), [("qwen3", "bytes"), ("mistral-v1", "sentencepiece")])
def test_the_prompts_of_a_conversation_share_one_history(name, kind):
    # Regression: each had its own list of all parts before it; 16,000 turns took 0.5 GB, and 100,000 all memory.
    turns = [Turn(role, f"{role} {n}") for n in range(300) for role in ("user", "assistant")]
    template = load_template(name, tokenizer_of(kind))
    exchanges = exchanges_of(template, Record(tuple(turns), "train.jsonl:1"))
    assert len({id(exchange.prompt.history) for exchange in exchanges}) == 1
    whole = as_one_piece(exchanges[-1].prompt).text
    for number, exchange in enumerate(exchanges):
        prompt = as_one_piece(exchange.prompt).text
        assert f"user {number}" in prompt and f"assistant {number}" not in prompt
        assert whole.startswith("".join(piece.text for piece in exchange.prompt.history[: exchange.prompt.length]))
