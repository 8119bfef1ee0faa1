"""Carried tensors: weights in the base's files that its transformers class does not load, copied into a merged folder.

Qwen3.5's files have layers that predict several tokens at once (`mtp.…`). transformers skips them silently, but servers
use them. A merged folder gets them unchanged, together with the settings of the base's image processor.

The files also have a few tensors in float32 (`A_log`) among the bfloat16 ones. transformers rounds these and servers do
not, so a merged folder has them unrounded.
"""

import json
import shutil
import zipfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from atomtune.disk import open_to_umask
from atomtune.model.adapter import same_bits
from atomtune.model.fingerprint import INDEX, weight_files
from atomtune.model.load import OLD_BUFFERS

#: Settings of image and video processors: preprocessor_config.json, video_preprocessor_config.json, …
_PROCESSORS = "*processor_config.json"


def carry_over(base: Path, out: Path, *, loaded: Collection[str], prefix: str) -> tuple[str, ...]:
    """Copy what the base's folder has and the written model lacks; return the names of the copied tensors.

    loaded  names of the tensors that the model has in memory, tied ones included
    prefix  the class's base_model_prefix, which a base's files may lack: GPT-2's and Bloom's have `h.0.…` where the
            class says `transformer.h.0.…`, and transformers loads both
    """
    for file in base.glob(_PROCESSORS):
        shutil.copyfile(file, out / file.name)
    written = {name for file in weight_files(out) for name, _ in _tensors(file, names_only=True)}
    known = {name.removeprefix(f"{prefix}.") for name in (*written, *loaded)}
    carried: dict[str, torch.Tensor] = {}
    for file in weight_files(base):
        stored = [name for name, _ in _tensors(file, names_only=True)]
        also_loaded = {name for name in stored if name.removeprefix(f"{prefix}.") in known}
        for name, tensor in _tensors(file, leaving_out=also_loaded):
            if not name.endswith(OLD_BUFFERS):
                carried[name] = tensor
    if carried:
        _add_shard(out, carried)
    return tuple(sorted(carried))


def keep_unrounded(base: Path, out: Path, *, dtype: torch.dtype) -> tuple[str, ...]:
    """Restore tensors that the base's files have in more bits than `dtype`, the base's own; return their names.

    Only tensors that equal the base's after rounding are restored. Those that an adapter or a quantization changed stay
    as they were written.
    """
    stored = {
        name: file
        for file in weight_files(base)
        for name, tensor in _tensors(file)
        if tensor.is_floating_point() and tensor.itemsize > dtype.itemsize
    }
    kept: list[str] = []
    for shard in weight_files(out) if stored else []:
        tensors = dict(_tensors(shard))
        sources = {stored[name] for name in tensors.keys() & stored.keys()}
        unrounded = {name: tensor for file in sources for name, tensor in _tensors(file) if stored.get(name) == file}
        rounded = [name for name, written in tensors.items() if _is_rounded(written, unrounded.get(name))]
        if rounded:
            beside = shard.with_suffix(".new")  # `tensors` may still be memory-mapped from `shard`
            save_file(tensors | {name: unrounded[name] for name in rounded}, beside, metadata={"format": "pt"})
            beside.replace(shard)
            kept += rounded
    if kept:
        if (out / INDEX).is_file():
            _write_index(out, weight_files(out))
        open_to_umask(out)
    return tuple(sorted(kept))


def _is_rounded(written: torch.Tensor, stored: torch.Tensor | None) -> bool:
    return stored is not None and stored.itemsize > written.itemsize and same_bits(stored.to(written.dtype), written)


def changed(base: Path, out: Path, names: Collection[str]) -> list[str]:
    """Which of these tensors differ from the base's in any bit, or are missing in `out`."""
    ours, theirs = (
        {name: tensor for file in weight_files(folder) for name, tensor in _tensors(file) if name in names}
        for folder in (out, base)
    )
    return sorted(name for name in names if name not in ours or not same_bits(ours[name], theirs[name]))


def _tensors(
    file: Path, *, leaving_out: Collection[str] = (), names_only: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each weight in a file. A pickled file is read as tensors only; no code in it runs."""
    empty = torch.empty(0)
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a dict
                if name not in leaving_out:
                    yield name, empty if names_only else weights.get_tensor(name)
        return
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    for name, tensor in tensors.items():
        if name not in leaving_out:
            yield name, tensor.contiguous()


def _add_shard(out: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add a weights file to a model's folder, and write the index of all its files."""
    files = weight_files(out)
    count = len(files) + 1
    shards: list[Path] = []
    for number, file in enumerate(files, 1):
        shards.append(file.rename(out / f"model-{number:05}-of-{count:05}.safetensors"))
    shards.append(out / f"model-{count:05}-of-{count:05}.safetensors")
    save_file(tensors, shards[-1], metadata={"format": "pt"})
    _write_index(out, shards)
    open_to_umask(out)


def _write_index(out: Path, shards: Sequence[Path]) -> None:
    weight_map, total_size = {}, 0
    for shard in shards:
        for name, tensor in _tensors(shard):
            weight_map[name] = shard.name
            total_size += tensor.nbytes
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
