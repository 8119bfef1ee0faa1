"""Probe: general prompts, to see whether a tuned model forgot what its base could do.

The base answers them; then the loss of each model on these answers is measured. A model that forgot nothing finds
them as likely as the base does. The prompts are our own (probe.jsonl): half English, half Chinese, a line or two each.
"""

import json
from collections.abc import Sequence
from importlib import resources

from atomtune.batch.collate import Collator
from atomtune.console import Console, progress_bar
from atomtune.data.encoding.chat_template import Template
from atomtune.data.records import Example
from atomtune.evaluate.likelihood import TargetScores, score_targets
from atomtune.evaluate.models import Models
from atomtune.language import translated
from atomtune.model.causal_lm import CausalLM
from atomtune.model.generate import prompt_ids, stop_ids
from atomtune.model.greedy_batch import generate_answers
from atomtune.model.load import pad_id_of

#: Longest answer of the base, in tokens.
ANSWER_TOKENS = 48


def probe_prompts() -> list[str]:
    """The prompts that come with atomtune."""
    text = (resources.files("atomtune.evaluate") / "probe.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["prompt"] for line in text.splitlines()]


def probe_scores(
    models: Models, collator: Collator, console: Console, *, prompts: Sequence[str], batch_size: int
) -> dict[str, list[TargetScores]]:
    """For every model, how likely it finds the base's answers, one entry per prompt."""
    base = models.subjects[0]
    scores: dict[str, list[TargetScores]] = {subject.name: [] for subject in models.subjects}
    questions = [prompt_ids(base.template, [{"role": "user", "content": prompt}]) for prompt in prompts]
    with progress_bar(console) as progress:
        task = progress.add_task(translated("forgetting probe"), total=len(questions))
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            with models.answering_as(base) as model:
                examples = _base_answers(model, batch, base.template)
            for subject in models.subjects:
                with models.answering_as(subject) as model:
                    scores[subject.name] += score_targets(model, [[example] for example in examples], collator)
            progress.advance(task, len(batch))
    return scores


def _base_answers(model: CausalLM, questions: Sequence[Sequence[int]], template: Template) -> list[Example]:
    """Each prompt with the base's answer after it, and the stop token if the answer ended by itself."""
    stop = template.tokenizer.convert_tokens_to_ids(template.stop)
    generated = generate_answers(
        model,
        questions,
        stop_ids=stop_ids(model, template),
        pad_id=pad_id_of(template.tokenizer),
        max_new_tokens=ANSWER_TOKENS,
    )
    examples: list[Example] = []
    for question, answer in zip(questions, generated, strict=True):
        ids = [*answer.ids, stop] if answer.stopped else list(answer.ids)
        examples.append(Example((*question, *ids), (0,) * len(question) + (1,) * len(ids), "probe"))
    return examples
