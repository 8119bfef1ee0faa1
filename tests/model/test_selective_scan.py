"""Selective scan: from a zero state it equals transformers' function; two halves of a sequence give the whole.

The oracle is the function that transformers' Mamba calls, which goes token by token.
"""

from typing import Any

import pytest
import torch
from torch.nn.modules import linear
from transformers.models.mamba import modeling_mamba

from atomtune.model import selective_scan as selective_scan_module
from atomtune.model.selective_scan import scans_from, selective_scan

SEQUENCES, CHANNELS, TOKENS, STATE = 2, 5, 9, 3


def some_inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).requires_grad_()

    along = (SEQUENCES, CHANNELS, TOKENS)
    return {
        "hidden_states": normal(*along),
        "dt": normal(*along),
        "A": (-torch.rand(CHANNELS, STATE, generator=draw) - 0.1).requires_grad_(),
        "B": normal(SEQUENCES, STATE, TOKENS),
        "C": normal(SEQUENCES, STATE, TOKENS),
        "D": normal(CHANNELS),
        "z": normal(*along),
        "delta_bias": normal(CHANNELS),
    }


def scanned(inputs: dict[str, torch.Tensor], **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rules = {"delta_softplus": True, "return_last_state": True, **others}
    return selective_scan(**renamed(inputs), **rules)


def gradients(results: tuple[torch.Tensor, torch.Tensor], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    nats = sum((result * torch.randn(result.shape, generator=draw)).sum() for result in results)
    return list(torch.autograd.grad(nats, list(inputs.values())))


def test_from_a_zero_state_the_scan_equals_transformers_own():
    inputs = some_inputs()
    theirs = modeling_mamba.mamba_selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    ours = scanned(inputs)
    for result, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(result, expected, atol=1e-5)  # float32, sums in another order
    for name, result, expected in zip(inputs, gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert (result - expected).norm() < 1e-5 * expected.norm(), name


def test_steps_that_are_positive_already_are_taken_as_they_are():
    inputs = {name: value.detach().abs() if name == "dt" else value.detach() for name, value in some_inputs().items()}
    del inputs["delta_bias"]
    ours = scanned(inputs, delta_softplus=False)
    theirs = modeling_mamba.mamba_selective_scan(**inputs, return_last_state=True)
    for result, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(result, expected, atol=1e-5)


#: Sums in another order.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("cut", [1, 4, TOKENS - 1])
def test_scanning_in_two_parts_equals_scanning_the_whole_sequence(cut, dtype):
    inputs = {name: value.detach().to(dtype).requires_grad_() for name, value in some_inputs().items()}
    along = {"hidden_states", "dt", "B", "C", "z"}
    first = {name: value[..., :cut] if name in along else value for name, value in inputs.items()}
    second = {name: value[..., cut:] if name in along else value for name, value in inputs.items()}
    beginning, state = scanned(first)
    end, last = scanned(second, initial_state=state)
    whole = scanned(inputs)
    parts = (torch.cat([beginning, end], -1), last)
    for result, expected in zip(parts, whole, strict=True):
        assert result.dtype == dtype
        assert (result - expected).norm() < TOLERANCES[dtype] * expected.norm()
    for name, result, expected in zip(inputs, gradients(parts, inputs), gradients(whole, inputs), strict=True):
        apart = (result - expected).norm() / expected.norm()
        assert apart < TOLERANCES[dtype], f"{name}: the gradient goes through the state"


def test_sixteen_bits_scan_in_float32():
    inputs = {name: value.detach().bfloat16() for name, value in some_inputs().items()}
    ours = scanned(inputs)
    exact = scanned({name: value.float() for name, value in inputs.items()})
    assert ours[1].dtype == torch.float32
    assert (ours[0] - exact[0]).norm() < 0.02 * exact[0].norm()  # dt is rounded to 8 bits, as in transformers


def test_transformers_scan_function_is_restored_after_the_context():
    own = modeling_mamba.mamba_selective_scan
    mixer = modeling_mamba.MambaMixer.__new__(modeling_mamba.MambaMixer)
    with pytest.raises(ZeroDivisionError), scans_from(mixer, None):
        assert modeling_mamba.mamba_selective_scan is not own
        raise ZeroDivisionError
    assert modeling_mamba.mamba_selective_scan is own


def test_a_mixer_without_scans_is_left_as_it_is():
    before = dict(vars(linear))
    with scans_from(linear.Linear(1, 1), None):
        assert vars(linear) == before


def test_a_packages_kernel_stays_in_use(monkeypatch):
    monkeypatch.setattr(selective_scan_module, "is_replaced", lambda _function: True)
    own = modeling_mamba.mamba_selective_scan
    with scans_from(modeling_mamba.MambaMixer.__new__(modeling_mamba.MambaMixer), None):
        assert modeling_mamba.mamba_selective_scan is own


def test_a_layer_of_several_scans_takes_the_state_of_each_in_turn():
    mixer = modeling_mamba.MambaMixer.__new__(modeling_mamba.MambaMixer)
    inputs = {name: value.detach() for name, value in some_inputs().items()}
    states = torch.randn(SEQUENCES, 2, CHANNELS, STATE, generator=torch.Generator().manual_seed(3))
    with scans_from(mixer, states):
        turns = [modeling_mamba.mamba_selective_scan(**renamed(inputs), delta_softplus=True) for _ in range(2)]
    for turn, state in zip(turns, states.unbind(1), strict=True):
        assert torch.equal(turn, scanned(inputs, initial_state=state)[0])


def test_a_scan_beyond_the_given_states_starts_at_zero():
    # The trial then finds the difference and chooses another way; StopIteration would end the run.
    mixer = modeling_mamba.MambaMixer.__new__(modeling_mamba.MambaMixer)
    inputs = {name: value.detach() for name, value in some_inputs().items()}
    state = torch.randn(SEQUENCES, CHANNELS, STATE, generator=torch.Generator().manual_seed(3))
    with scans_from(mixer, state):
        turns = [modeling_mamba.mamba_selective_scan(**renamed(inputs), delta_softplus=True) for _ in range(2)]
    assert torch.equal(turns[0], scanned(inputs, initial_state=state)[0])
    assert torch.equal(turns[1], scanned(inputs)[0])


def renamed(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mixers pass the first argument by position."""
    return {"u" if name == "hidden_states" else name: value for name, value in inputs.items()}
