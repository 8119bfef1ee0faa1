"""Carried states: a convolution reads the same inputs as with transformers' cache, and a branch starts where its parent
ended."""

import pytest
import torch
from transformers.cache_utils import LinearAttentionLayer

from atomtune.batch.segment_plan import SegmentBatch
from atomtune.model.carried_state import States, states_before

KERNEL = 4


def some_inputs(tokens: int, seed: int) -> torch.Tensor:
    """[G, D, n] for 2 sequences and 3 channels."""
    return torch.randn(2, 3, tokens, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", [KERNEL, None])
@pytest.mark.parametrize("lengths", [(1, 2, 5), (KERNEL, 2, 2), (6, 1, 3)], ids=str)
def test_the_inputs_of_a_convolution_are_those_with_transformers_cache(lengths, kernel):
    if kernel is None:  # a layer that passes on the whole state itself, always of one size
        lengths = (lengths[0],) * 3
    theirs, before = LinearAttentionLayer(), States()
    for turn, tokens in enumerate(lengths):
        x = some_inputs(tokens, seed=turn)
        expected = theirs.update_conv_state(x.clone(), conv_kernel_size=kernel)
        assert torch.equal(before.update_conv_state(x, conv_kernel_size=kernel), expected)
        assert torch.equal(before.new_conv[0], theirs.conv_states[0])
        assert before.has_previous_state() == (turn > 0)
        before = States(before.new_conv)


def batch_of(*parents: tuple[int, int]) -> SegmentBatch:
    return SegmentBatch(torch.zeros(len(parents), 2), torch.arange(2 * len(parents)), parents)


def test_branches_start_with_the_states_of_their_parents_from_any_batch():
    ended = []
    for number, tokens in enumerate((2, 7)):  # one shorter than the kernel
        states = States()
        states.update_conv_state(some_inputs(tokens, seed=number), conv_kernel_size=KERNEL)
        states.update_recurrent_state(some_inputs(5, seed=10 + number), state_idx=1)
        ended.append(states)
    for parents in ([(1, 0), (1, 1), (1, 0)], [(0, 1), (1, 1), (0, 0)]):
        started = states_before(batch_of(*parents), ended)
        assert torch.equal(started.get_conv_state(), torch.stack([ended[b].new_conv[0][i] for b, i in parents]))
        of_recurrence = torch.stack([ended[b].new_recurrent[1][i] for b, i in parents])
        assert torch.equal(started.get_recurrent_state(state_idx=1), of_recurrence)
        assert started.get_recurrent_state() is None


def test_a_root_starts_without_a_state():
    started = states_before(SegmentBatch(torch.zeros(1, 3), torch.arange(3), ()), [])
    assert started.get_conv_state() is None and started.get_recurrent_state() is None
    assert not started.has_previous_state()
