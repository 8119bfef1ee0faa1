"""Merged answers: a merged model gets the same prompts as base + adapter, and must give the same answers."""

from collections.abc import Sequence

import torch
from peft import PeftModel

from atomtune.data.encoding.chat_template import Template
from atomtune.errors import CheckFailed
from atomtune.export.output_folder import NOT_KEPT
from atomtune.model.agreement import Measure, another_plain_way, distribution_measures
from atomtune.model.causal_lm import CausalLM
from atomtune.model.generate import prompt_ids

#: The prompts of the check: several languages, digits, code, several lines.
PROBES = (
    "你是谁？",
    "Who are you?",
    "1 + 1 = ?\n请一步一步地想。",
    "今天天气怎么样？",
    "Write a short poem about the sea, and explain what it means to you.",
    "def fibonacci(n):",
    "Translate into German: I would like a cup of tea, please.",
)


def refuse_other_prompts(template: Template, written: Template) -> None:
    """Raise CheckFailed if the written folder gives a prompt other ids than in training."""
    for probe in PROBES:
        messages = [{"role": "user", "content": probe}]
        if prompt_ids(template, messages) != prompt_ids(written, messages):
            raise CheckFailed(
                f"The merged model's tokenizer turns {probe!r} into other tokens than in training. {NOT_KEPT}"
            )


@torch.no_grad()
def compare_answers(
    adapted: PeftModel, written: CausalLM, template: Template, *, dtype: torch.dtype
) -> Sequence[Measure]:
    """Compare the written model's next-token distributions with those of base + adapter, at all prompt positions.

    dtype  that of the written weights, which decides how much rounding is allowed
    """
    prompts = [prompt_ids(template, [{"role": "user", "content": probe}]) for probe in PROBES]
    plain = _log_probabilities(adapted, prompts)
    with another_plain_way(adapted):
        again = _log_probabilities(adapted, prompts)
    return distribution_measures(_log_probabilities(written, prompts), plain, again, dtype=dtype)


def _log_probabilities(model: CausalLM, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[N, V] log-probabilities of the token after each position of the prompts."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])  # [1, T]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]  # [T, V]
        rows.append(logits.double().log_softmax(-1))
    return torch.cat(rows)  # [N, V], N tokens of all prompts


def refuse_other_answers(measures: Sequence[Measure]) -> None:
    """Raise CheckFailed if a distance is larger than rounding explains."""
    failed = []
    for measure in measures:
        if not measure.holds:
            difference, noise, allowed = f"{measure.difference:.1e}", f"{measure.noise:.1e}", f"{measure.allowed:.1e}"
            failed.append(f"  {measure.name}: {difference} (two plain runs: {noise}, allowed: {allowed})")
    if failed:
        raise CheckFailed("The merged model does not answer like the adapter:\n" + "\n".join([*failed, NOT_KEPT]))
