"""Fused RMSNorms: the value and gradient of the formula, and only for modules that compute this formula."""

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from atomtune.model.fused_norm import FusedNorm, RmsNorm, fuse_norms, offset_of
from tests.model.test_layout_support import build, with_adapter

WIDTH = 64
EPS = 1e-6


def formula(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    rows = [row / (row.square().sum() / len(row) + EPS).sqrt() * factors for row in x.flatten(0, -2)]
    return torch.stack(rows).view_as(x)


def filled(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The norm with a frozen weight that is not all ones."""
    nn.init.normal_(norm.weight, mean=0.5)
    return norm.to(dtype).requires_grad_(requires_grad=False)


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 30.0])  # below, near and above sqrt(eps)
@pytest.mark.parametrize("strided", [False, True])
def test_the_fused_norm_matches_the_formula_and_its_gradient(scale, strided):
    torch.manual_seed(0)
    wide = torch.randn(3, 5, 2 * WIDTH, dtype=torch.float64) * scale
    x = (wide[..., :WIDTH] if strided else wide[..., :WIDTH].clone()).requires_grad_()
    factors, grad = torch.randn(WIDTH, dtype=torch.float64), torch.randn(3, 5, WIDTH, dtype=torch.float64)
    ours, theirs = RmsNorm.apply(x, factors, EPS), formula(x, factors)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(theirs, x, grad)[0]
    torch.testing.assert_close(torch.autograd.grad(ours, x, grad)[0], expected, rtol=1e-10, atol=1e-10 / scale)


def test_the_output_can_be_modified_in_place():
    # Autograd forbids that for a view created inside a function: a model that scales its norm's output failed.
    x, factors = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True), torch.randn(WIDTH, dtype=torch.float64)
    ours, theirs = RmsNorm.apply(x, factors, EPS).mul_(3), 3 * formula(x, factors)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("norm_class", "offset"), [(LlamaRMSNorm, 0.0), (Gemma3RMSNorm, 1.0)])
def test_a_fused_norm_is_about_as_accurate_as_the_original(norm_class, offset, dtype):
    torch.manual_seed(0)
    plain = filled(norm_class(WIDTH, eps=EPS), dtype)
    fused = copy.deepcopy(plain)
    assert fuse_norms(fused) == 1 and fused.offset == offset
    x, grad = torch.randn(50, WIDTH).to(dtype), torch.randn(50, WIDTH).to(dtype)
    exact = x.double().requires_grad_()
    truth = formula(exact, plain.weight.double() + offset)
    truth = (truth, torch.autograd.grad(truth, exact, grad.double())[0])

    def distances(norm: nn.Module) -> list[float]:
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        results = out, torch.autograd.grad(out, leaf, grad)[0]
        return [(ours.double() - right).norm().item() for ours, right in zip(results, truth, strict=True)]

    for ours, theirs in zip(distances(fused), distances(plain), strict=True):
        # Up to half as much error more: Gemma rounds once after its factors, the fused norm once before them too.
        assert 0 < ours < 1.5 * theirs


def test_a_fused_norm_without_gradients_equals_the_original_bit_for_bit():
    plain = filled(LlamaRMSNorm(WIDTH), torch.bfloat16)
    fused, x = copy.deepcopy(plain), torch.randn(50, WIDTH).bfloat16()
    fuse_norms(fused)
    fused.eval()
    with torch.no_grad():
        assert torch.equal(fused(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_input_of_another_dtype_is_left_to_the_original(dtype):
    # As of norms in float32 within another model: the original decides on the output's dtype.
    plain = filled(LlamaRMSNorm(WIDTH), torch.float32)
    fused, x = copy.deepcopy(plain), torch.randn(5, WIDTH, dtype=dtype)
    assert fuse_norms(fused) == 1
    assert fused(x).dtype == plain(x).dtype
    assert torch.equal(fused(x), plain(x))


class NoEps(LlamaRMSNorm):
    """A norm that has an eps and does not use it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True)).to(x.dtype) * self.weight


class NeedsTwo(LlamaRMSNorm):
    """A norm with a required gate."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * gate.sigmoid()


class NeedsItsGate(LlamaRMSNorm):
    """A norm whose gate has a default but is required, as in Kimi Linear."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x) * gate.sigmoid()


@pytest.mark.parametrize("norm_class", [NeedsTwo, NeedsItsGate])
def test_a_norm_with_a_required_gate_is_not_fused(norm_class):
    assert fuse_norms(filled(norm_class(WIDTH), torch.float32)) == 0


def gated(norm_class: type[nn.Module], group_size: int) -> nn.Module:
    """Older transformers have no group_size: one group of the whole width."""
    groups = {"group_size": group_size} if "group_size" in inspect.signature(norm_class).parameters else {}
    return norm_class(WIDTH, **groups, eps=EPS)


@pytest.mark.parametrize(
    "other",
    [
        nn.LayerNorm(WIDTH, eps=EPS, bias=False),
        NoEps(WIDTH),
        gated(MambaRMSNormGated, WIDTH),  # without a gate it is the formula
        gated(GraniteMoeHybridRMSNormGated, 16),
        nn.Linear(WIDTH, 1, bias=False),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_that_compute_another_formula_keep_their_results(other):
    module = filled(other, torch.bfloat16)
    x, gate = torch.randn(5, WIDTH).bfloat16(), torch.randn(5, WIDTH).bfloat16()
    is_gated = "Gated" in type(module).__name__
    before = module(x, gate) if is_gated else module(x)
    fuse_norms(module)
    assert torch.equal(module(x, gate) if is_gated else module(x), before)


class WithBias(LlamaRMSNorm):
    """A norm whose bias is zero at first."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.bias


def test_a_trainable_norm_is_not_fused():
    assert offset_of(LlamaRMSNorm(WIDTH)) is None
    norm = WithBias()
    norm.weight.requires_grad_(requires_grad=False)
    assert offset_of(norm) is None, "its bias is still trained, by an adapter with bias all"


@pytest.mark.parametrize(("family", "norms"), [("llama", 5), ("qwen3", 9), ("gemma3_text", 13), ("gpt2", 0)])
def test_all_norms_of_a_model_are_found(family, norms):
    model = with_adapter(build(family)).float()
    names = model.state_dict().keys()
    assert fuse_norms(model) == norms
    assert fuse_norms(model) == 0, "norms were fused twice"
    assert model.state_dict().keys() == names
    assert sum(isinstance(module, FusedNorm) for module in model.modules()) == norms
