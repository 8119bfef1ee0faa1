"""Merged answers: differences by rounding pass; other answers, or other ids for the same prompt, do not."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from atomtune.data.encoding.choose_template import load_template
from atomtune.errors import CheckFailed
from atomtune.export.merged_answers import compare_answers, refuse_other_answers, refuse_other_prompts
from atomtune.export.merged_weights import merge_weights
from atomtune.model.adapter import load_trained
from atomtune.model.load import BaseSpec, load_base
from tests.adapters import CPU, adapter_on


@pytest.fixture
def template(models):
    return load_template("auto", AutoTokenizer.from_pretrained(models("llama")))


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_correct_merge_passes_the_answer_check_and_an_altered_one_fails(models, template, tmp_path, factor):
    base = models("llama")
    adapter = adapter_on(base, tmp_path, size=0.01)
    spec = BaseSpec(path=str(base), dtype=torch.float32, device=CPU)
    adapted, written = (load_trained(load_base(spec), adapter) for _ in range(2))
    written = merge_weights(written)
    with torch.no_grad():
        written.model.layers[0].mlp.down_proj.weight.mul_(factor)
    measures = compare_answers(adapted, written, template, dtype=torch.float32)
    if factor == 1:
        refuse_other_answers(measures)
    else:
        with pytest.raises(
            CheckFailed, match=r"does not answer like the adapter:\n(.|\n)*The merged model is not kept"
        ):
            refuse_other_answers(measures)


def test_a_template_that_renders_other_ids_is_refused(template):
    refuse_other_prompts(template, template)
    with pytest.raises(CheckFailed, match="into other tokens than in training"):
        refuse_other_prompts(template, replace(template, source="{{ messages[0].content }}"))
