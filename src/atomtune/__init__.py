"""atomtune: LoRA instruction fine-tuning of causal language models.

from atomtune import train, sweep, load, inspect, evaluate: the commands as functions (api.py).
from atomtune import share_prefixes: rows with shared beginnings, for a training loop of your own (own_loop.py).
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
#: Functions of the library, and the modules from which they are imported when they are first used.
_FUNCTIONS = {
    "train": "atomtune.api",
    "sweep": "atomtune.api",
    "load": "atomtune.api",
    "inspect": "atomtune.api",
    "evaluate": "atomtune.api",
    "share_prefixes": "atomtune.own_loop",
}
__all__ = ["__version__", "evaluate", "inspect", "load", "share_prefixes", "sweep", "train"]


class _Package(ModuleType):
    """The package. Its functions `train`, `sweep`, `inspect` and `evaluate` have the same names as subpackages.

    Python's import system would replace a function with the subpackage of that name as soon as that is imported.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _FUNCTIONS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _FUNCTIONS:
            raise AttributeError(f"module 'atomtune' has no attribute {name!r}")
        function = getattr(importlib.import_module(_FUNCTIONS[name]), name)
        setattr(self, name, function)
        return function

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_FUNCTIONS]


sys.modules[__name__].__class__ = _Package
