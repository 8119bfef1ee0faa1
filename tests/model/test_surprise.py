"""Surprise in few passes, compared with torch's cross entropy in float64."""

import math
import weakref

import pytest
import torch
from torch.nn import functional

from atomtune.model.surprise import surprise

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: One rounding of the logits' gradient, and a few for a float32 sum.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [9, 50], targets and weights: likely and unlikely targets, and one with weight 0."""
    random = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(9, 50, generator=random, dtype=torch.float64)).to(dtype)
    target = torch.randint(50, (9,), generator=random)
    target[:4] = logits[:4].argmax(-1)
    learn = torch.rand(9, generator=random)
    learn[5] = 0
    return logits, target, learn


def by_torch(logits: torch.Tensor, target: torch.Tensor, learn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.detach().double().requires_grad_()
    nats = (functional.cross_entropy(logits, target, reduction="none") * learn.double()).sum()
    (gradient,) = torch.autograd.grad(nats, logits)
    return nats, gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_and_its_gradient_are_those_of_cross_entropy(dtype):
    logits, target, learn = case(dtype)
    before = logits.clone()
    nats = surprise(logits.requires_grad_(), target, learn)
    (gradient,) = torch.autograd.grad(3 * nats, logits)
    expected, expected_gradient = by_torch(before, target, learn)
    assert nats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert nats.item() == pytest.approx(expected.item(), rel=min(TOLERANCE[dtype], 1e-6))
    assert gradient.dtype == dtype
    assert (gradient.double() - 3 * expected_gradient).abs().max() <= 3 * TOLERANCE[dtype]
    assert torch.equal(logits, before), "the logits are the model's: its soft cap needs them for its own gradient"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_gradient_the_sum_is_the_same(dtype):
    logits, target, learn = case(dtype)
    with torch.no_grad():
        evaluated = surprise(logits, target, learn)
    assert evaluated.item() == surprise(logits.requires_grad_(), target, learn).item()


def test_the_softmax_is_freed_in_the_backward_pass():
    # The loss lives until the backward pass has ended, and so would a float32 tensor as large as the logits.
    logits, target, learn = case(torch.bfloat16)
    nats = surprise(logits.requires_grad_(), target, learn)
    softmax = weakref.ref(nats.grad_fn.weights)
    assert softmax() is not None
    nats.backward()
    assert softmax() is None


@pytest.mark.parametrize("height", [0, 30, 1000])
def test_small_losses_of_likely_targets_are_exact_at_any_logit_offset(height):
    # A run that has learned its records ends with a mean of such targets.
    logits = torch.zeros(20, 50) + height
    logits[:, 7] += 12
    learn, target = torch.ones(20), torch.full((20,), 7)
    expected = functional.cross_entropy(logits, target, reduction="sum")
    assert surprise(logits, target, learn).item() == pytest.approx(expected.item(), abs=20 * 1.2e-7)


def test_a_target_with_probability_below_float32_gets_its_full_loss():
    logits = torch.tensor([[0.0, -400.0, -math.inf]], requires_grad=True)  # exp(-400) is below float32
    nats = surprise(logits, torch.tensor([1]), torch.ones(1))
    (gradient,) = torch.autograd.grad(nats, logits)
    assert nats.item() == 400
    assert gradient.tolist() == [[1, -1, 0]]


def test_nan_logits_give_nan_loss_and_gradient():
    logits = torch.tensor([[0.0, math.nan]], requires_grad=True)
    nats = surprise(logits, torch.tensor([0]), torch.ones(1))
    (gradient,) = torch.autograd.grad(nats, logits)
    assert math.isnan(nats.item())
    assert gradient.isnan().all()


def test_label_smoothing_equals_torch_cross_entropy():
    logits, target, learn = case(torch.float32)
    expected = functional.cross_entropy(logits, target, reduction="none", label_smoothing=0.1)
    assert surprise(logits, target, learn, 0.1).item() == pytest.approx((expected * learn).sum().item())
