"""Fingerprint: identifies the base of an adapter by a few numbers of every weight.

An adapter also loads on another base of the same shape (a model and its fine-tuned sibling) without an error, and then
answers nonsense. The numbers are read from the weight files, so that the dtype, quantization and device in use do not
matter.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from atomtune.choices import MODEL_CONFIG
from atomtune.disk import expanded
from atomtune.errors import BadModel
from atomtune.model.file_schemas import WeightIndex
from atomtune.model.json_files import checked, refuse_no_files
from atomtune.model.load_errors import explained

INDEX = "model.safetensors.index.json"
OLD_INDEX = "pytorch_model.bin.index.json"
#: How many numbers are read from the first and from the middle row of each weight.
_NUMBERS = 32
_LONGEST_NAME = 200  # characters of a file's name


def fingerprint(path: str) -> str | None:
    """A hash of every weight's name, shape and some numbers in bfloat16; None if there are no weights here.

    Raises BadModel if they cannot be read.
    """
    folder = folder_of(path)
    if folder:
        refuse_no_files(folder)
    files = weight_files(folder) if folder else []
    if not files:
        return None
    with explained(str(folder), "model"):
        entries = [(name, *_sample(weight, shape)) for file in files for name, shape, weight in stored_weights(file)]
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()


def stored_weights(file: Path) -> Iterator[tuple[str, list[int], Any]]:
    """(name, shape, weight) of every weight in a file. Pickled files are read as tensors only; no code runs.

    A weight is a tensor, or a slice of safetensors, which reads from the file what it is indexed with.
    """
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a dict
                part = weights.get_slice(name)
                yield name, list(part.get_shape()), part
        return
    # Memory-mapped, so that only the numbers used are read. Files from before 2020 are no zip archives and are read
    # whole.
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    for name, weight in tensors.items():
        yield name, list(weight.shape), weight


def _sample(weight: Any, shape: list[int]) -> tuple[list[int], list[float]]:
    """Shape, and numbers of the first and middle rows in bfloat16: copies in bfloat16 and float32 have the same.

    A float16 copy of a float32 base is rounded twice, which changes 6 % of the numbers, so it is another base.
    """
    if not shape or 0 in shape:
        return shape, []
    if len(shape) == 1:
        parts = [weight[:_NUMBERS]]
    else:
        parts = [weight[row : row + 1].flatten()[:_NUMBERS] for row in (0, shape[0] // 2)]
    return shape, torch.cat([part.to(torch.bfloat16).float() for part in parts]).tolist()


def folder_of(path: str) -> Path | None:
    """The folder a model is loaded from: the path itself, or its snapshot in the hub's cache; None if there is none."""
    local = expanded(path)
    if local.is_dir():
        return local
    try:
        config = cached_file(path, MODEL_CONFIG, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(config).parent if config else None


def weight_files(folder: Path) -> list[Path]:
    """The weight files in a model's folder: safetensors, else those that torch.save wrote; empty if there are none.

    A snapshot in the hub's cache whose download was interrupted has none either: loading the model completes it.
    Raises BadModel for an index that cannot be read, or that names a missing file or one outside the folder.
    """
    # Both indexes are read first: a bad one is refused even if the other would be enough.
    shards = {index: _named_in(folder / index) for index in (INDEX, OLD_INDEX) if (folder / index).is_file()}
    for index, pattern in ((INDEX, "model*.safetensors"), (OLD_INDEX, "pytorch_model*.bin")):
        files = shards[index] if index in shards else sorted(folder.glob(pattern))
        if files:
            return files
    return []


def _named_in(index: Path) -> list[Path]:
    names = set(checked(index, WeightIndex).weight_map.values())
    outside = sorted(name for name in names if not _is_file_name(name))
    if outside:
        listed = ", ".join(repr(name[:60]) for name in outside[:3])
        raise BadModel(f"{index}: names {listed}, which is not a file name in this folder.")
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing and _is_snapshot(index.parent):
        return []
    if missing:
        raise BadModel(f"{index}: names {', '.join(missing[:3])}, which is not in this folder. Copy the model again.")
    return [index.parent / name for name in sorted(names)]


def _is_snapshot(folder: Path) -> bool:
    """Whether a folder is in the hub's cache: models--OWNER--NAME/snapshots/REVISION, with blobs beside snapshots."""
    return folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and "\\" not in name and len(name) <= _LONGEST_NAME


def is_at_hand(path: str) -> bool:
    """Whether a base's weights are on this machine; a model on the hub is downloaded when it is first loaded.

    Before that there is no fingerprint, so `refuse_other_base` has to be called again after the download.
    """
    folder = folder_of(path)
    return folder is not None and bool(weight_files(folder))


def refuse_other_base(path: str, expected: str, *, anyway: bool, notice: Callable[[str], None]) -> None:
    """Raise BadModel if an adapter was trained on another base than this one; with `anyway`, give a notice instead."""
    actual = fingerprint(path)
    if not expected or actual is None or actual == expected:
        return
    difference = (
        f"{path} is not the base this adapter was trained on: its weights differ "
        f"(fingerprint {actual[:12]}…; trained on {expected[:12]}…)."
    )
    if not anyway:
        raise BadModel(f"{difference}\nPass --model_path with the right base, or --other_base to use this one anyway.")
    notice(difference)


def say_unchecked(path: str, expected: str, *, notice: Callable[[str], None]) -> None:
    """Give a notice if a base could not be compared with an adapter's, because its weights are not on this machine."""
    if expected and not is_at_hand(path):
        notice(
            f"the weights of {path} are not on this machine, so whether the adapter was trained on them was not "
            "checked."
        )
