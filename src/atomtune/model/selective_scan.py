"""Selective scan: the recurrence of Mamba 1 and Jamba, from a given state.

    h[t] = exp(A dt[t]) h[t-1] + dt[t] B[t] u[t]        y[t] = C[t] h[t] + D u[t]

transformers' torch code always starts from h = 0, so a branch could not continue from its parent's last state. It also
does ten small operations per token, each with its own backward step. Here each token takes one operation in each
direction, and the rest is computed for all tokens at once. If a package's kernel (mamba-ssm) is installed, it stays in
use, and rows are computed by paths.
Letters: G sequences, T tokens, D channels, N size of a channel's state.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from atomtune.model.mixer_kernels import is_replaced

#: The name of the function in the files of all transformers models with such layers.
_NAME = "mamba_selective_scan"


@contextlib.contextmanager
def scans_from(mixer: nn.Module, state: torch.Tensor | None) -> Iterator[None]:
    """Within this context, the scans of a mixer, if it has any, start from this state.

    state  [G, D, N]; [G, scans, D, N] for a mixer that calls several scans in turn (Zamba); None: zero
    """
    functions = vars(sys.modules[type(mixer).__module__])
    own = functions.get(_NAME)
    if own is None or is_replaced(own):
        yield
        return
    states = iter(state.unbind(1) if state is not None and state.dim() == 4 else [state])

    def scan(*args: Any, **kwargs: Any) -> Any:
        # A wrong number of scans fails the trial
        return selective_scan(*args, **kwargs, initial_state=next(states, None))

    functions[_NAME] = scan
    try:
        yield
    finally:
        functions[_NAME] = own


def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: torch.Tensor | None = None,
    **_: Any,
) -> Any:
    """The outputs [G, D, T] and, with return_last_state, also the last state [G, D, N]; in float32 or float64.

    u, dt, z  [G, D, T]      A  [D, N]      B, C  [G, N, T]      D, delta_bias  [D]
    The parameters are those of transformers' function; its others, which choose among equal computations, are ignored.
    """
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[:, None]
    if delta_softplus:
        dt = functional.softplus(dt)
    wide = torch.promote_types(torch.float32, u.dtype)
    # Tokens come first, so that what one step reads and writes is contiguous.
    steps = dt.to(wide).permute(2, 0, 1)[..., None]  # [T, G, D, 1]
    inputs = u.to(wide).permute(2, 0, 1)[..., None] * B.to(wide).permute(2, 0, 1)[:, :, None]  # [T, G, D, N]
    decays = torch.exp(steps * A.to(wide))
    if initial_state is None:
        initial_state = decays.new_zeros(decays.shape[1:])
    states: torch.Tensor = _Recurrence.apply(decays, steps * inputs, initial_state.to(wide))
    out = (states @ C.to(wide).permute(2, 0, 1)[..., None]).squeeze(-1).permute(1, 2, 0)  # [G, D, T]
    if D is not None:
        out = out + u * D[:, None]
    if z is not None:
        out = out * functional.silu(z)
    return (out, states[-1]) if return_last_state else out


class _Recurrence(torch.autograd.Function):
    """h[t] = decays[t] * h[t-1] + inputs[t] for all t; decays, inputs [T, G, D, N], first state [G, D, N]."""

    @staticmethod
    def forward(ctx: Any, decays: torch.Tensor, inputs: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        states = torch.empty_like(decays)
        before = first
        for decay, added, state in zip(decays, inputs, states, strict=True):
            before = torch.addcmul(added, decay, before, out=state)
        ctx.save_for_backward(decays, states, first)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        decays, states, first = ctx.saved_tensors
        of_states = grads.clone(memory_format=torch.contiguous_format)
        # The gradient of a state: that of its own output, plus what comes back from the next state.
        for t in range(len(of_states) - 2, -1, -1):
            of_states[t].addcmul_(decays[t + 1], of_states[t + 1])
        of_decays = torch.cat([(of_states[0] * first)[None], of_states[1:] * states[:-1]])
        return of_decays, of_states, decays[0] * of_states[0]
