"""Reference: what our side answers to each prompt, computed before an engine is started."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from atomtune.certify.prompts import CertPrompt
from atomtune.data.encoding.chat_template import Template
from atomtune.model.adapter import answering_as
from atomtune.model.generate import stop_ids
from atomtune.model.greedy_batch import generate_answers
from atomtune.model.load import pad_id_of
from atomtune.model.surprise import exact

#: How many of the most likely tokens are kept per step, to recognise a tie.
KEPT_CHOICES = 8


@dataclass(frozen=True)
class Expected:
    """The results of our side for one prompt."""

    prompt: CertPrompt
    reference_ids: tuple[int, ...]  # the record's answer with its stop token; without one, our own greedy answer
    tuned: list[float]  # log-probability of each reference token
    base: list[float]
    greedy_ids: tuple[int, ...]
    greedy_text: str
    stopped: bool
    # Per greedy step, and after the last: token → log-probability of the most likely ones
    choices: list[dict[int, float]]


def expect(model: Any, prompts: Sequence[CertPrompt], template: Template, *, max_new_tokens: int) -> list[Expected]:
    """The results of our side for every prompt; model is a PeftModel, whose adapter can be disabled."""
    return [_expected(model, prompt, template, max_new_tokens=max_new_tokens) for prompt in prompts]


def _expected(model: Any, prompt: CertPrompt, template: Template, *, max_new_tokens: int) -> Expected:
    tokenizer = template.tokenizer
    (answer,) = generate_answers(
        model,
        [prompt.prompt_ids],
        stop_ids=stop_ids(model, template),
        pad_id=pad_id_of(tokenizer),
        max_new_tokens=max_new_tokens,
    )
    stop = tokenizer.convert_tokens_to_ids(template.stop)
    our_answer = (*answer.ids, stop) if answer.stopped else answer.ids
    reference_ids = prompt.reference_ids or our_answer
    tuned = _of_tokens(model, prompt.prompt_ids, reference_ids)
    with answering_as(model, None):
        base = _of_tokens(model, prompt.prompt_ids, reference_ids)
    # One row per greedy step, and one after the last, because an engine may continue where our answer stops.
    likeliest = _log_probabilities(model, prompt.prompt_ids, answer.ids).topk(KEPT_CHOICES)  # [A + 1, KEPT_CHOICES]
    choices = []
    for token_ids, scores in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True):
        choices.append(dict(zip(token_ids, scores, strict=True)))
    text = tokenizer.decode(list(answer.ids), skip_special_tokens=True)
    return Expected(prompt, reference_ids, tuned, base, answer.ids, text, answer.stopped, choices)


def _of_tokens(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    scores = _log_probabilities(model, prompt, answer)[: len(answer)]  # [A, V]
    own_scores = scores.gather(1, torch.tensor(answer)[:, None])[:, 0]  # [A]
    return own_scores.tolist()


@torch.no_grad()
def _log_probabilities(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """[A + 1, V] log-probabilities of each answer token and, in the last row, of the token after them."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)  # [1, P + A]
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 :]  # [A + 1, V], from the prompt's last token on
    return exact(logits).log_softmax(-1).cpu()
