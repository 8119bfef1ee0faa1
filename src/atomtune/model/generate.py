"""Answers: a prompt through the training template, tokens until the stop token.

Before: adapter.py.  After: serve.chat, train.run's samples.
"""

from collections.abc import Sequence
from typing import Any

import torch

from atomtune.data.encoding.chat_template import Message, Template
from atomtune.data.encoding.token_ids import ids_of
from atomtune.model.load import pad_id_of


def prompt_ids(template: Template, messages: Sequence[Message]) -> list[int]:
    """The ids the model was trained to answer: the same template, the same laws."""
    return ids_of([template.prompt_piece(messages)], template.tokenizer)[0]


def stop_ids(template: Template) -> list[int]:
    """The trained stop token, and the tokenizer's own end of text."""
    stop = template.tokenizer.convert_tokens_to_ids(template.stop)
    return sorted({stop, template.tokenizer.eos_token_id} - {None})


@torch.no_grad()
def answer(
    model: Any,
    template: Template,
    messages: Sequence[Message],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    streamer: Any = None,
) -> str:
    """One answer; greedy at temperature 0, so that the same prompt gives the same answer."""
    ids = torch.tensor([prompt_ids(template, messages)], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    was_training = model.training
    model.eval()
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids(template),
        pad_token_id=pad_id_of(template.tokenizer),
        use_cache=True,
        streamer=streamer,
        **sampling,
    )
    model.train(was_training)
    return template.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
