"""Fingerprint: which base an adapter belongs to, told from a few numbers of every weight.

Two bases of one shape (a model and its fine-tuned sibling) take each other's adapters without a word and answer
nonsense. Read from the safetensors files, so that it does not depend on the dtype, quantization or device in use.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from atomtune.errors import BadModel

INDEX = "model.safetensors.index.json"
#: How many numbers are read at the beginning and in the middle of each weight.
_NUMBERS = 32


def fingerprint(path: str) -> str | None:
    """A hash over every weight's name, shape and some of its numbers in bfloat16; None without safetensors."""
    folder = folder_of(path)
    files = weight_files(folder) if folder else []
    if not files:
        return None
    entries = []
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a dict
                entries.append((name, *_sample(weights.get_slice(name))))
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()


def _sample(weight: Any) -> tuple[list[int], list[float]]:
    """Shape, and numbers of the first row and the middle one, in bfloat16: a copy in another dtype has the same."""
    shape = list(weight.get_shape())
    if not shape or 0 in shape:
        return shape, []
    if len(shape) == 1:
        parts = [weight[:_NUMBERS]]
    else:
        parts = [weight[row : row + 1].flatten()[:_NUMBERS] for row in (0, shape[0] // 2)]
    return shape, torch.cat([part.to(torch.bfloat16).float() for part in parts]).tolist()


def folder_of(path: str) -> Path | None:
    """The folder a model was loaded from: itself, or its snapshot in the hub's cache."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    try:
        config = cached_file(path, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(config).parent if config else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder.

    Raises BadModel for an index that names a file outside of its folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("model*.safetensors"))
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    outside = sorted(name for name in names if not isinstance(name, str) or Path(name).name != name or "\\" in name)
    if outside:
        raise BadModel(f"{index}: names {', '.join(map(repr, outside[:3]))}, which is not a file name in this folder.")
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def refuse_other_base(path: str, expected: str, *, anyway: bool, notice: Callable[[str], None]) -> None:
    """Raise BadModel when an adapter was trained on another base than this one; a notice with `anyway`."""
    found = fingerprint(path)
    if not expected or found is None or found == expected:
        return
    said = (
        f"{path} is not the base this adapter was trained on: its weights are others "
        f"(fingerprint {found[:12]}…; trained on {expected[:12]}…)."
    )
    if not anyway:
        raise BadModel(f"{said}\nPass --model_path with the right one, or --other_base to use this one nevertheless.")
    notice(said)
