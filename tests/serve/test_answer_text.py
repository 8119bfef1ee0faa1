"""The text that a reader sees while an answer's tokens arrive."""

import torch

from atomtune.data.encoding.choose_template import load_template
from atomtune.serve.answer_text import AnswerText
from tests.tiny import CHATML, tokenizer_of


def test_a_character_is_streamed_only_once_it_is_complete():
    template = load_template("auto", tokenizer_of("bytes", CHATML))
    ids = template.tokenizer("灯亮", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2, "a character has several tokens"
    for count in range(1, len(ids) + 1):
        pieces: list[str] = []
        text = AnswerText(template, pieces.append)
        text.put(torch.tensor([[1, 2]]))  # the prompt
        for token in ids[:count]:
            text.put(torch.tensor([token]))
        text.end()
        assert "".join(pieces) == template.tokenizer.decode(ids[:count]).replace("\ufffd", "")


def test_an_incomplete_character_before_the_stop_token_is_shown():
    template = load_template("auto", tokenizer_of("bytes", CHATML))
    ids = template.tokenizer("灯亮", add_special_tokens=False)["input_ids"][:-1]
    pieces: list[str] = []
    text = AnswerText(template, pieces.append)
    text.put(torch.tensor([[1, 2]]))
    for token in [*ids, template.tokenizer.convert_tokens_to_ids(template.stop)]:
        text.put(torch.tensor([token]))
    text.end()
    assert "".join(pieces) == template.tokenizer.decode(ids)
