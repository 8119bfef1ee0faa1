"""Liger: the package's fused kernels for norms, rotary embeddings and activations, patched into a loaded model.

Its fused loss stays off: the loss in loss.py counts a shared target as often as it is learned. All changes of the
package are recorded, so that they can be undone if the model then computes something else.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.integrations.liger import apply_liger_kernel

from atomtune.model import layout_trial
from atomtune.model.causal_lm import CausalLM
from atomtune.model.loss import innermost

_INSTALL = "pip install liger-kernel"
_LOSSES = ("fused_linear_cross_entropy", "cross_entropy")


@dataclass(frozen=True)
class Circumstances:
    """What decides whether Liger's kernels are tried.

    wanted        --use_liger_kernel; None if it is not set
    device        type of the run's device: "cuda", "cpu", …
    is_installed  whether the package is installed
    is_sharded    whether weights are sharded over processes (FSDP, DeepSpeed); the Trainer then applies the kernels
    config        --liger_kernel_config
    """

    wanted: bool | None
    device: str
    is_installed: bool
    is_sharded: bool = False
    config: Mapping[str, Any] | None = None

    @property
    def tries(self) -> bool:
        """Whether to try the kernels before the first step: by default only on CUDA, where they were measured."""
        if self.wanted is False or not self.is_installed or self.is_sharded:
            return False
        return self.device == "cuda" or bool(self.wanted and self.device != "cpu")

    @property
    def hint(self) -> str | None:
        """A notice about what to install; None if that would not help."""
        if self.wanted is None and self.device == "cuda" and not self.is_installed and not self.is_sharded:
            return f"Liger's kernels for norms and activations would make a step faster: {_INSTALL}"
        return None


def problems(circumstances: Circumstances) -> Iterator[str]:
    """Why a run cannot have the kernels that its settings ask for."""
    if circumstances.wanted and circumstances.device == "cpu":
        yield "--use_liger_kernel true: Liger's kernels run on a GPU, and this run uses a CPU. Leave it out."
    elif circumstances.wanted and not circumstances.is_installed:
        yield f"--use_liger_kernel true needs a package: {_INSTALL}"
    for name in _LOSSES:
        if (circumstances.config or {}).get(name):
            yield f"--liger_kernel_config: {name} cannot be used: atomtune has a loss of its own."


def is_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def kernel_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The user's `--liger_kernel_config`, with the losses off."""
    return {**(config or {}), **dict.fromkeys(_LOSSES, False)}


def use(model: CausalLM, circumstances: Circumstances, *, say: Callable[[str], None]) -> bool:
    """Apply the kernels if `circumstances` tries them, unless the model then computes something else.

    say  is told whether the model uses them and, if not, why
    Returns whether it uses them.
    """
    if not circumstances.tries:
        return False
    patch = Patch(model, kernel_config(circumstances.config))
    reason = layout_trial.changed_by(model, patch.put_in)
    if reason is None and patch.has_kernels:
        say("norms, activations and rotary embeddings are computed by Liger's kernels.")
        return True
    patch.take_out()
    reason = reason or f"it has none for {innermost(model).config.model_type}"
    say(f"Liger's kernels are not used: {reason}.")
    return False


#: Modules (files) of transformers that are patched, each with its original contents.
_IN_FILES: list[tuple[Any, dict[str, Any]]] = []


def leave_files() -> None:
    """Restore the patched files of transformers.

    A model that is loaded next, on a CPU or in float64, then computes with the original code. The trained model keeps
    the kernels in its modules, but not replaced functions, such as that for rotary embeddings.
    """
    _restore(_IN_FILES)
    _IN_FILES.clear()


def _contents(holders: Iterable[Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Modules of a model, or files of transformers, each with its contents."""
    return [(holder, dict(vars(holder))) for holder in holders]


def _restore(contents: Iterable[tuple[Any, Mapping[str, Any]]]) -> None:
    for holder, before in contents:
        vars(holder).clear()
        vars(holder).update(before)


class Patch:
    """Liger's kernels in one model: applied, and removed again.

    The package gives modules a new `forward`, and replaces functions and classes in the transformers file that the
    model's classes come from.

    has_kernels  whether the package knows the model: its kernels are applied, and some module was changed by that
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        self.inner, self.config = innermost(model), dict(config)
        self.has_kernels = False
        self._of_modules = _contents(self.inner.modules())

    def put_in(self) -> None:
        """Apply the kernels."""
        names = {type(module).__module__ for module in self.inner.modules()}
        _IN_FILES.extend(_contents(sys.modules[name] for name in names if name.startswith("transformers.models.")))
        just_before = _contents(self.inner.modules())  # the trial has changed modules too: they are in eval mode
        apply_liger_kernel(self.inner, self.config)
        self.has_kernels = any(
            before.get(name) is not value for module, before in just_before for name, value in vars(module).items()
        )

    def take_out(self) -> None:
        _restore(self._of_modules)
        leave_files()
