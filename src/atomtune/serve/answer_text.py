"""Answer text: turns generated tokens into text while they are written, in whole characters."""

import re
from collections.abc import Callable

import torch
from transformers.generation.streamers import BaseStreamer

from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.reply import shown

#: A byte of a character for which SentencePiece has no token.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class AnswerText(BaseStreamer):
    """Passes on each piece of an answer's text as soon as it is final; `ids` are all tokens so far."""

    def __init__(self, template: Template, hand_on: Callable[[str], None]) -> None:
        self.template, self.hand_on = template, hand_on
        self.ids: list[int] = []
        self._prompt_is_over = False
        self._text = ""  # text passed on so far

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_is_over:  # generate sends the prompt first
            self._prompt_is_over = True
            return
        self.ids += value.flatten().tolist()
        text = shown(self.template, self.ids)
        # A character of several tokens is shown when it is complete. SentencePiece decodes consecutive byte tokens
        # together, and a later byte that is invalid turns all of them into replacement characters.
        whole = not text.endswith("\ufffd") and not self._ends_in_a_byte()
        if whole and text.startswith(self._text):
            self._hand_on(text)

    def _ends_in_a_byte(self) -> bool:
        token = self.template.tokenizer.convert_ids_to_tokens(self.ids[-1])
        return bool(token and _BYTE_TOKEN.fullmatch(token))

    def end(self) -> None:
        text = shown(self.template, self.ids)
        ended_itself = bool(self.ids) and self.ids[-1] in self.template.tokens.control_ids
        self._hand_on(text if ended_itself else text.rstrip("\ufffd"))  # at the limit, a character may be cut in two

    def _hand_on(self, text: str) -> None:
        more = text[len(self._text) :]
        if more:
            self.hand_on(more)
        self._text = text
