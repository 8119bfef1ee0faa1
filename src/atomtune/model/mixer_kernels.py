"""Mixer kernels: which code computes linear attention, Mamba layers and convolutions, and what would be faster.

transformers writes each of these as a plain torch function, and replaces it with a package's kernel if that package is
installed. Which one is used is visible only in the function's closure. If another version of transformers keeps it
elsewhere, no kernels are reported.
"""

import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: module of a package → its name for pip
_DISTRIBUTIONS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm"}


@dataclass(frozen=True)
class MixerKernels:
    """The packages whose kernels a model can use, by their names for pip.

    used     installed and in use
    missing  not installed: transformers' torch code is used instead
    """

    used: tuple[str, ...]
    missing: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.used or self.missing)

    def described(self, device: torch.device) -> str:
        """A line about what computes these layers, and what installing the missing packages would change."""
        own = "transformers' own torch code"
        computing = f"kernels of {' and '.join(self.used)}" if self.used else own
        if self.used and self.missing:
            computing += f", the rest by {own}"
        line = f"linear attention, Mamba, convolutions: {computing}."
        if not self.missing:
            return line
        if device.type == "cuda":
            return f"{line} For faster kernels: pip install {' '.join(self.missing)}"
        return f"{line} On a GPU, {' and '.join(self.missing)} would be faster."


def kernels_of(model: nn.Module) -> MixerKernels:
    """Search the functions that the classes of a model's modules call."""
    is_used: dict[str, bool] = {}
    for class_ in {type(module) for module in model.modules()}:
        for package, used in _places(class_):
            is_used[package] = is_used.get(package, False) or used
    names: dict[bool, list[str]] = {True: [], False: []}  # by whether they are in use
    for package, used in sorted(is_used.items()):
        names[used].append(_DISTRIBUTIONS.get(package, package))
    return MixerKernels(used=tuple(names[True]), missing=tuple(names[False]))


def _places(class_: type) -> Iterator[tuple[str, bool]]:
    """(package, whether it is in use) for each function that a class calls and that a package may replace."""
    functions_of_file = vars(sys.modules[class_.__module__])
    for method in vars(class_).values():
        if not inspect.isfunction(method):
            continue
        for name in inspect.unwrap(method).__code__.co_names:
            place = _closure(functions_of_file.get(name))
            if "package" in place and "is_new_implementation" in place:
                yield place["package"], bool(place["is_new_implementation"])


def package_that_raised(error: BaseException, packages: Mapping[str, str] = _DISTRIBUTIONS) -> str | None:
    """The package (by its name for pip) whose kernel raised an error, or None: it may not support this GPU or compiler.

    packages  module → name for pip
    """
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = (packages.get(module.partition(".")[0]) for module in reversed(frames))
    return next((name for name in names if name), None)


def is_replaced(function: Any) -> bool:
    """Whether a package's kernel has replaced this function."""
    return bool(_closure(function).get("is_new_implementation"))


def _closure(function: Any) -> dict[str, Any]:
    """The values in a function's closure by name, including those of the functions it wraps."""
    kept: dict[str, Any] = {}
    while inspect.isfunction(function):
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        kept = {name: cell.cell_contents for name, cell in cells} | kept
        function = vars(function).get("__wrapped__")
    return kept
