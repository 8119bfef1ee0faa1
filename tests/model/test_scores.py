"""Scores: softmax weights beside sinks, compared with a softmax over keys and sink in float64."""

import pytest
import torch
from transformers import AutoConfig

from atomtune.model.scores import names_a_cap, weights_beside_sinks


def test_in_sixteen_bits_only_the_weights_themselves_are_rounded():
    # In bfloat16 the logarithm of the sum would be off by up to 2 %, and so would all weights of the query.
    draw = torch.Generator().manual_seed(0)
    scores = (4 * torch.randn(3, 50, 40, generator=draw)).bfloat16()  # [H, Q, K]
    sinks = torch.randn(3, 1, 1, generator=draw).bfloat16()
    together = torch.cat([scores, sinks.expand(3, 50, 1)], -1).double()
    expected = together.softmax(-1)[..., :-1]
    weights = weights_beside_sinks(scores, sinks)
    assert weights.dtype == torch.bfloat16
    assert ((weights.double() - expected).abs() <= 2**-8 * expected).all()


@pytest.mark.parametrize(
    ("family", "values", "is_capped"),
    [
        ("gemma2", {}, True),
        ("gemma2", {"attn_logit_softcapping": None}, False),
        ("gemma3", {"text_config": {"attn_logit_softcapping": 50.0}}, True),  # the text model of a larger one
        ("gemma3", {}, False),
        ("llama", {}, False),
    ],
)
def test_a_cap_is_read_from_the_text_models_config(family, values, is_capped):
    assert names_a_cap(AutoConfig.for_model(family, **values)) == is_capped
