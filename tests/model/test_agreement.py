"""Agreement: rounding is told apart from faults by the noise of two plain runs."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from atomtune.model.agreement import (
    another_plain_way,
    distribution_measures,
    gradient_measures,
    log_probability_measures,
    relative_difference,
    worst_gradient,
)
from tests.hybrids import WALKED
from tests.tiny import CAPPED
from tests.vision_language import config_of

DRAW = torch.Generator().manual_seed(0)
WORDS, POSITIONS = 500, 200


def some_logits() -> torch.Tensor:
    return 3 * torch.randn(POSITIONS, WORDS, generator=DRAW).double()


def noisy(logits: torch.Tensor, size: float) -> torch.Tensor:
    return (logits + size * torch.randn(logits.shape, generator=DRAW).double()).log_softmax(-1)


@pytest.mark.parametrize("size", [1e-6, 1e-2])
def test_the_noise_of_two_plain_runs_passes_and_ten_times_as_much_fails(size):
    logits = some_logits()
    plain, again = noisy(logits, size), noisy(logits, size)
    for times, holds in ((1, True), (10, False)):
        ours = noisy(logits, times * size)
        measures = distribution_measures(ours, plain, again, dtype=torch.float32)
        assert all(measure.holds for measure in measures) == holds
        targets = [x[:, 0] for x in (ours, plain, again)]
        assert all(measure.holds for measure in log_probability_measures(*targets, dtype=torch.float32)) == holds


def test_one_outlier_position_passes_and_five_percent_of_outliers_fail():
    # Rounding also produces one such maximum among a hundred thousand numbers.
    logits = some_logits()
    plain, again = noisy(logits, 1e-2), noisy(logits, 1e-2)
    for wild, holds in ((1, True), (POSITIONS // 20, False)):
        ours = noisy(logits, 1e-2)
        ours[:wild, 0] += 0.5
        assert (
            all(m.holds for m in log_probability_measures(ours[:, 0], plain[:, 0], again[:, 0], dtype=torch.float32))
            == holds
        )


def test_equal_plain_runs_still_allow_a_unit_in_the_last_place():
    plain = noisy(some_logits(), 0)[:, 0]
    for apart, holds in ((0.5, True), (3.0, False)):
        ours = plain + apart * torch.finfo(torch.bfloat16).eps
        assert all(m.holds for m in log_probability_measures(ours, plain, plain, dtype=torch.bfloat16)) == holds


def test_float32_softmax_rounding_passes_if_every_token_is_unlikely():
    # Near -11.5, neighbouring float32 numbers are 1e-6 apart: eight times float32's epsilon.
    logits = 0.01 * torch.randn(POSITIONS, 100_000, generator=DRAW)
    plain, ours = logits.double().log_softmax(-1)[:, 0], logits.log_softmax(-1)[:, 0].double()
    assert all(m.holds for m in log_probability_measures(ours, plain, plain, dtype=torch.float32))
    ours += 1e-5
    assert not all(m.holds for m in log_probability_measures(ours, plain, plain, dtype=torch.float32))


def test_float32_rounding_of_logits_passes_the_distribution_measures():
    # Two plain runs may round the same way. Near 11, float32 numbers are 1e-6 apart: eight times its epsilon.
    logits = 11 + 0.01 * torch.randn(POSITIONS, 50_000, generator=DRAW).double()
    plain, ours = logits.log_softmax(-1), logits.float().double().log_softmax(-1)
    assert all(m.holds for m in distribution_measures(ours, plain, plain, dtype=torch.float32))
    assert not all(m.holds for m in distribution_measures(noisy(logits, 1e-5), plain, plain, dtype=torch.float32))


def test_other_top_tokens_are_a_fault_even_if_the_distributions_hardly_differ():
    # Where two words are almost equally likely, nothing but the answer changes with their order.
    logits = some_logits()
    logits[:, 0], logits[:, 1] = 14.0, 14.0 - 1e-4
    noise = 1e-2 * torch.randn(logits.shape, generator=DRAW).double()
    noise[:, :2] = 0
    other = logits.clone()
    other[:, [0, 1]] = logits[:, [1, 0]]
    plain, again, ours = (each.log_softmax(-1) for each in (logits, logits + noise, other))
    faults = [m.name for m in distribution_measures(ours, plain, again, dtype=torch.float32) if not m.holds]
    assert faults == ["share of different top tokens"]


def test_nan_always_fails():
    plain = noisy(some_logits(), 0)[:, 0]
    assert not all(m.holds for m in log_probability_measures(plain * torch.nan, plain, plain, dtype=torch.float32))


def test_a_wrong_gradient_of_one_weight_is_detected_and_named():
    plain = {name: torch.randn(20, 30, generator=DRAW).double() for name in "abc"}
    again = {name: value * (1 + 1e-3) for name, value in plain.items()}
    assert all(m.holds for m in gradient_measures(again, plain, again, dtype=torch.float32))
    wrong = {**again, "b": 1.1 * plain["b"]}
    assert worst_gradient(wrong, plain) == "b"
    assert not all(m.holds for m in gradient_measures(wrong, plain, again, dtype=torch.float32))


def test_one_wrong_gradient_among_many_is_judged_by_the_noise_of_single_weights():
    # In the norm over all weights it disappears.
    plain = {str(n): torch.randn(4, 5, generator=DRAW).double() for n in range(400)}
    again = {name: value * (1 + 1e-3) for name, value in plain.items()}
    of_all, of_worst = gradient_measures({**again, "7": 1.01 * plain["7"]}, plain, again, dtype=torch.float32)
    assert of_all.holds and not of_worst.holds
    assert of_worst.noise == pytest.approx(1e-3, rel=1e-6)


def test_a_missing_or_nan_gradient_is_detected():
    plain = {"a": torch.ones(3).double(), "never reached": torch.zeros(3).double()}
    assert all(m.holds for m in gradient_measures(plain, plain, plain, dtype=torch.float32))
    for value in (torch.zeros(3), torch.full((3,), torch.nan)):
        ours = {**plain, "a": value.double()}
        assert not all(m.holds for m in gradient_measures(ours, plain, plain, dtype=torch.float32))


def test_the_second_plain_run_uses_another_attention_and_restores_it(models):
    model = AutoModelForCausalLM.from_pretrained(models("llama"))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        first = model(input_ids=ids).logits
        with another_plain_way(model):
            assert model.config._attn_implementation == "eager"
            second = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, first)
    assert not torch.equal(first, second)
    assert torch.allclose(first, second, atol=1e-4)


def test_a_lost_gradient_is_a_fault_however_large_the_noise_is():
    plain = {name: torch.randn(20, 30, generator=DRAW).double() for name in "ab"}
    again = {name: 1.5 * gradient for name, gradient in plain.items()}
    assert all(m.holds for m in gradient_measures(again, plain, again, dtype=torch.bfloat16))
    lost = {**plain, "b": torch.zeros(20, 30).double()}
    assert not all(m.holds for m in gradient_measures(lost, plain, again, dtype=torch.bfloat16))


@pytest.mark.parametrize("family", WALKED)
def test_the_noise_is_as_large_as_the_error_of_float32(family):
    # gpt-oss supports no other attention, and few layers of Qwen3.5 have attention. Changing only the attention showed
    # a fraction of float32's rounding, and correct computations of these models were called wrong.
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **WALKED[family])
    # torch's grouped matrix product for experts does not support float64.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    ids, own = torch.arange(3, 200)[None], model.config._attn_implementation
    with torch.no_grad():
        plain = model(input_ids=ids).logits[0].double().log_softmax(-1)
        with another_plain_way(model):
            assert (model.config._attn_implementation != own) == (family != "gpt_oss")
            again = model(input_ids=ids).logits[0].double().log_softmax(-1)
        assert torch.equal(model(input_ids=ids).logits[0].double().log_softmax(-1), plain)
        exact = model.double()(input_ids=ids).logits[0].log_softmax(-1)
    # Not by divergence, which one or two positions dominate: 0.3 to 10 times by the seed. This one: 0.9 to 1.9 times.
    error, noise = (plain - exact).abs().mean(), (again - plain).abs().mean()
    assert error / 2 < noise < 4 * error


def test_the_second_plain_run_keeps_the_models_soft_caps():
    # transformers 5.17 uses sdpa for Gemma 2 without its caps. The noise would then be as large as that fault.
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma2", **CAPPED)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    ids = torch.arange(3, 80)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with another_plain_way(model):
            again = model(input_ids=ids).logits
    assert not torch.equal(plain, again)
    assert torch.allclose(plain, again, atol=1e-4)


def test_a_tower_with_a_different_attention_gets_its_own_restored(monkeypatch):
    # VibeVoice: restoring one name for all parts ended the run. Fun-ASR Nano's adaptor has no attention.
    model = AutoModelForImageTextToText.from_config(config_of("mistral3", vocabulary=97), attn_implementation="sdpa")
    tower, text = model.model.vision_tower, model.model.language_model
    monkeypatch.setattr(type(tower), "_supports_sdpa", False)
    for own in ("eager", None):
        tower.config._attn_implementation = own
        with another_plain_way(model):
            assert text.config._attn_implementation == "eager"
        assert (tower.config._attn_implementation, text.config._attn_implementation) == (own, "sdpa")
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("order", [1, -1])
def test_a_gradient_that_is_nan_is_named_as_the_worst(order):
    plain = dict([("a", torch.ones(3)), ("b", torch.ones(3))][::order])
    ours = {"a": torch.full((3,), torch.nan), "b": torch.ones(3) * 1.5}
    assert worst_gradient(ours, plain) == "a"
    assert relative_difference(ours, plain) == math.inf


def test_a_gradient_where_there_should_be_none_differs_infinitely():
    none = {"a": torch.zeros(3)}
    assert relative_difference({"a": torch.ones(3)}, none) == math.inf
    assert relative_difference(none, none) == 0
