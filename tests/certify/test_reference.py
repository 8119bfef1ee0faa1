"""What our side expects of an engine, compared with plain PEFT and the plain base, one token at a time."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from atomtune.certify.prompts import OUR_OWN, choose_prompts
from atomtune.certify.reference import KEPT_CHOICES, Expected, expect
from atomtune.data.records import Record, Turn
from atomtune.model.adapter import load_trained
from atomtune.model.adapter_folder import template_of

LIMIT = 8  # some answers are longer


@pytest.fixture(scope="module")
def sides(models, by_heart) -> tuple[list[Expected], int, PeftModel, torch.nn.Module]:
    """Our side for a record's prompt and our own ones, the stop token, and the plain models, tuned and not."""
    base, tuned, ours = (AutoModelForCausalLM.from_pretrained(models("llama")).eval() for _ in range(3))
    template, _ = template_of(by_heart, trust_remote_code=False)
    record = Record((Turn("user", "Who are you?"), Turn("assistant", "Nobody knows.")), "a:1")
    prompts = choose_prompts([record], template, count=20, max_tokens=256)
    expected = expect(load_trained(ours, by_heart), prompts, template, max_new_tokens=LIMIT)
    stop = template.tokenizer.convert_tokens_to_ids(template.stop)
    return expected, stop, PeftModel.from_pretrained(tuned, str(by_heart)).eval(), base


@torch.no_grad()
def next_token(model, ids) -> torch.Tensor:
    """[V] log-probabilities of the token after these."""
    return model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def test_the_scores_are_those_of_the_tuned_model_and_of_the_base(sides):
    expected, _, tuned, base = sides
    for each in expected:
        before = list(each.prompt.prompt_ids)
        for token, of_tuned, of_base in zip(each.reference_ids, each.tuned, each.base, strict=True):
            # float32 on both sides, summed in another order
            assert next_token(tuned, before)[token].item() == pytest.approx(of_tuned, abs=1e-3)
            assert next_token(base, before)[token].item() == pytest.approx(of_base, abs=1e-3)
            before.append(token)


def test_the_greedy_answer_and_its_alternatives_are_the_most_likely_tokens(sides):
    expected, stop, tuned, _ = sides
    assert {each.stopped for each in expected} == {True, False}
    for each in expected:
        written = [*each.greedy_ids, stop] if each.stopped else [*each.greedy_ids]
        before = list(each.prompt.prompt_ids)
        for token, choices in zip(written, each.choices, strict=False):
            likeliest = next_token(tuned, before).topk(KEPT_CHOICES).indices.tolist()
            assert token == likeliest[0] and set(choices) == set(likeliest)
            before.append(token)
        assert len(each.choices) == len(each.greedy_ids) + 1 and len(each.greedy_ids) <= LIMIT


def test_an_answer_of_the_record_is_scored_where_there_is_one_else_our_own_with_its_stop_token(sides):
    expected, stop, *_ = sides
    assert {each.prompt.origin for each in expected} == {"a:1", OUR_OWN}
    for each in expected:
        ours = (*each.greedy_ids, stop) if each.stopped else each.greedy_ids
        assert each.reference_ids == (each.prompt.reference_ids if each.prompt.origin == "a:1" else ours)
        assert each.prompt.reference_ids != ours
