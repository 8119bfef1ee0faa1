"""The trial at start-up refuses planted faults and accepts what is right."""

import pytest
import torch

from atomtune.batch import attention_plan
from atomtune.batch.row import Row, untils
from atomtune.batch.segment_plan import plan_segments
from atomtune.errors import BadModel
from atomtune.model import carried_state, layout_trial, row_mixers
from atomtune.model.layout_support import why_padded, windows_of
from atomtune.model.loss import body_of, innermost
from atomtune.model.mixers import find_mixers
from atomtune.model.row_attention import ROWS, register
from tests.hybrids import HYBRIDS, hybrid


def by_forks(family):
    """A model that computes its rows by forked states."""
    register()
    model = hybrid(family)
    mixers, attends = find_mixers(innermost(model))
    if attends:
        innermost(model).set_attn_implementation(ROWS)
    row_mixers.install(body_of(model), mixers, "fork")
    return model


def tried(model):
    return layout_trial.difference(model, windows=windows_of(model), cut="blocks", mixers="fork")


def no_state(batch, states):
    return carried_state.States()


picked = carried_state._picked


def state_of_another_parent(of_parents, batch):
    return picked(of_parents, batch).roll(1, 0)


def all_behind_each_other(row):
    parents = tuple(range(-1, len(row) - 1))
    return plan_segments(Row(row.ids, parents, untils(parents), row.learn, row.origins))


def records_behind_each_other(row):
    parents = tuple(i - 1 if parent < 0 else parent for i, parent in enumerate(row.parent))
    return plan_segments(Row(row.ids, parents, untils(parents), row.learn, row.origins))


FAULTS = {
    "no state is handed over": (row_mixers, "states_before", no_state),
    "a state of another parent": (carried_state, "_picked", state_of_another_parent),
    "a branch reads its sibling": (attention_plan, "plan_segments", all_behind_each_other),
    "a record reads the one before": (attention_plan, "plan_segments", records_behind_each_other),
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_correctly_computed_rows_are_accepted(family):
    assert tried(by_forks(family)) is None


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_planted_fault_is_refused(monkeypatch, family, fault, dtype):
    model = by_forks(family).to(dtype)
    monkeypatch.setattr(*FAULTS[fault])
    assert "trial tree" in tried(model)


@pytest.mark.parametrize(("apart", "is_right"), [(0.8, True), (5.0, False)])
def test_in_16_bits_a_tree_may_deviate_only_as_far_as_verify_allows(apart, is_right):
    # 5 times the noise is what a RecurrentGemma in bfloat16 had whose branches continued from their siblings.
    noise = torch.tensor([0.01], dtype=torch.float64)
    plain, rows, without = (layout_trial._Result(scores, {}) for scores in (0 * noise, apart * noise, 100 * noise))
    limits = layout_trial._limits(hybrid("lfm2").bfloat16())
    reason = layout_trial._verdict(plain, rows, without, noise=(0.01, 0.01), dtype=torch.bfloat16, limits=limits)
    assert (reason is None) == is_right


def test_a_gradient_that_is_lost_in_rows_is_refused():
    # The other weights' gradients are right, and so are all log-probabilities.
    scores, gradient = torch.zeros(4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    plain, rows = (layout_trial._Result(scores, {"a": gradient, "b": lost}) for lost in (gradient, None))
    halved = layout_trial._Result(scores, {"a": gradient, "b": 0.5 * gradient})
    without, limits = layout_trial._Result(scores + 1, {}), layout_trial._limits(hybrid("lfm2"))
    for side, words in ((plain, "None"), (rows, "differ from its records' by inf"), (halved, "by 3.5e-01")):
        # However large the noise of gradients is.
        reason = layout_trial._verdict(plain, side, without, noise=(0.0, 1.0), dtype=torch.float64, limits=limits)
        assert words in str(reason)


class _Poisoned(torch.autograd.Function):
    """Identity whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


def test_a_model_with_nan_gradients_only_in_rows_is_refused():
    # As Gemma 3n's was, which normalizes the pad id's zero row.
    model = by_forks("lfm2")
    longest = 105
    innermost(model).model.layers[2].register_forward_pre_hook(
        lambda _m, args: (_Poisoned.apply(args[0]), *args[1:]) if args[0].shape[1] > longest else args
    )
    assert "gradients of a trial tree differ" in tried(model)


def test_a_model_that_looks_ahead_is_refused():
    model = hybrid("lfm2")
    innermost(model).get_input_embeddings().register_forward_hook(lambda _m, _i, out: out + out.mean(1, keepdim=True))
    reason = why_padded(model)
    assert reason is not None
    assert "not causal" in reason


def test_a_lora_layer_that_never_gets_a_gradient_is_named_in_the_error():
    model = hybrid("lfm2")
    for layer in innermost(model).model.layers:
        if hasattr(layer, "conv"):
            # Like a model that reads a layer's weight but never calls the layer (Jamba's dt_proj).
            weight = layer.conv.in_proj.base_layer.weight
            layer.conv.in_proj.forward = lambda x, weight=weight: torch.nn.functional.linear(x, weight)
    with pytest.raises(BadModel, match="LoRA on in_proj never gets a gradient"):
        why_padded(model)


def test_a_refused_model_keeps_its_own_attention_and_forward(monkeypatch):
    model = hybrid("qwen3_5_text")
    before = innermost(model).config._attn_implementation
    monkeypatch.setattr(layout_trial, "_verdict", lambda *_, **__: "planted")
    assert why_padded(model) == "planted"
    assert innermost(model).config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_trial_draws_no_random_numbers():
    # A resumed run restores its random state; a draw in between would change the dropout.
    model = hybrid("lfm2").train()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    before = torch.get_rng_state()
    assert why_padded(model) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
