"""Carried tensors: weights in the base's files that its transformers class does not load, copied into a merged folder.

Qwen3.5's files have layers that predict several tokens at once (`mtp.…`). transformers skips them silently, but servers
use them. A merged folder gets them unchanged, together with the settings of the base's image processor.

The files also have a few tensors in float32 (`A_log`) among the bfloat16 ones. transformers rounds these and servers do
not, so a merged folder has them unrounded.
"""

import json
import shutil
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from atomtune.folders import open_to_umask
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
    written = [name for file in weight_files(out) for name in _names(file)]
    known = {_bare(name, prefix) for name in (*written, *loaded)}
    carried: dict[str, torch.Tensor] = {}
    for file in weight_files(base):
        also_loaded = {name for name in _names(file) if _bare(name, prefix) in known}
        for name, tensor in _tensors(file, leaving_out=also_loaded):
            if not name.endswith(OLD_BUFFERS):
                carried[name] = tensor
    if carried:
        _add_shard(out, carried)
    return tuple(sorted(carried))


def keep_unrounded(base: Path, out: Path, *, prefix: str) -> tuple[str, ...]:
    """Restore tensors that the base's files have in more bits than most of their tensors; return the restored names.

    Only tensors that equal the base's after rounding are restored. Those that an adapter or a quantization changed stay
    as they were written, and so does a base that is stored in float32 throughout.
    prefix  as in `carry_over`
    """
    file_of = _wider_than_most(base, prefix=prefix)
    if not file_of:
        return ()
    restored: list[str] = []
    for shard in weight_files(out):
        tensors = dict(_tensors(shard))
        wide = {name: bare for name in tensors if (bare := _bare(name, prefix)) in file_of}
        stored = _by_bare_name({file_of[bare] for bare in wide.values()}, set(wide.values()), prefix=prefix)
        unrounded: dict[str, torch.Tensor] = {}  # name in the shard → the base's tensor
        for name, bare in wide.items():
            if _is_rounded(tensors[name], stored[bare]):
                unrounded[name] = stored[bare]
        if unrounded:
            beside = shard.with_suffix(".new")  # `tensors` may still be memory-mapped from `shard`
            save_file(tensors | unrounded, beside, metadata={"format": "pt"})
            beside.replace(shard)
            restored += list(unrounded)
    if restored:
        if (out / INDEX).is_file():
            _write_index(out, weight_files(out))
        open_to_umask(out)
    return tuple(sorted(restored))


def _wider_than_most(base: Path, *, prefix: str) -> dict[str, Path]:
    """name without prefix → file, for tensors with more bits than the dtype that most of the base's bytes have."""
    bytes_of: dict[torch.dtype, int] = {}
    dtypes: dict[str, tuple[Path, torch.dtype]] = {}
    for file in weight_files(base):
        for name, tensor in _tensors(file):
            if tensor.is_floating_point():
                bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.nbytes
                dtypes[_bare(name, prefix)] = file, tensor.dtype
    usual = max(bytes_of, key=bytes_of.__getitem__, default=torch.float32)
    return {name: file for name, (file, dtype) in dtypes.items() if dtype.itemsize > usual.itemsize}


def _is_rounded(written: torch.Tensor, stored: torch.Tensor) -> bool:
    return stored.itemsize > written.itemsize and same_bits(stored.to(written.dtype), written)


def changed(base: Path, out: Path, names: Collection[str], *, prefix: str) -> list[str]:
    """Which of these tensors differ from the base's in any bit, or are missing in one of the folders.

    prefix  as in `carry_over`
    """
    bare_names = {name: _bare(name, prefix) for name in names}
    wanted = set(bare_names.values())
    ours = _by_bare_name(weight_files(out), wanted, prefix=prefix)
    theirs = _by_bare_name(weight_files(base), wanted, prefix=prefix)
    differing: list[str] = []
    for name, bare in bare_names.items():
        if bare not in ours or bare not in theirs or not same_bits(ours[bare], theirs[bare]):
            differing.append(name)
    return sorted(differing)


def _by_bare_name(files: Iterable[Path], wanted: Collection[str], *, prefix: str) -> dict[str, torch.Tensor]:
    """The wanted tensors of these files, by their names without the prefix."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        for name, tensor in _tensors(file):
            if (bare := _bare(name, prefix)) in wanted:
                tensors[bare] = tensor
    return tensors


def _bare(name: str, prefix: str) -> str:
    """A tensor's name without the prefix, which the base's files and the merged ones may have or not."""
    return name.removeprefix(f"{prefix}.")


def _names(file: Path) -> list[str]:
    """The names of the weights in a file, which is read only as far as needed for them."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as weights:
            return list(weights.keys())
    return list(_pickled(file))


def _tensors(file: Path, *, leaving_out: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each weight in a file."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a dict
                if name not in leaving_out:
                    yield name, weights.get_tensor(name)
        return
    for name, tensor in _pickled(file).items():
        if name not in leaving_out:
            yield name, tensor.contiguous()


def _pickled(file: Path) -> Mapping[str, torch.Tensor]:
    """A pickled file, read as tensors only; no code in it runs."""
    tensors: Mapping[str, torch.Tensor] = torch.load(
        file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
    )
    return tensors


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
