"""Fingerprint: which weight files a base has, in a folder of the user and in the hub's cache."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from atomtune.errors import BadModel
from atomtune.model.fingerprint import fingerprint, weight_files


def sharded(folder: Path, *, shards_here: int) -> Path:
    """A base in two shards, of which so many are in its folder."""
    folder.mkdir(parents=True)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names[:shards_here]:
        save_file({name: torch.ones(2, 2)}, folder / name)
    index = {"metadata": {}, "weight_map": {name: name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def test_a_shard_missing_in_a_folder_is_named(tmp_path):
    with pytest.raises(BadModel, match=r"names model-00002-of-00002\.safetensors, which is not in this folder"):
        weight_files(sharded(tmp_path / "base", shards_here=1))


@pytest.mark.parametrize(("shards_here", "files"), [(0, 0), (1, 0), (2, 2)])
def test_an_interrupted_download_is_completed_instead_of_refused(tmp_path, shards_here, files):
    # Regression: after Ctrl-C during a download, every command told the user to copy the model again.
    repository = tmp_path / "models--owner--base"
    (repository / "blobs").mkdir(parents=True)
    snapshot = sharded(repository / "snapshots" / "0123abc", shards_here=shards_here)
    assert len(weight_files(snapshot)) == files
    assert (fingerprint(str(snapshot)) is not None) == (files > 0)


def incomplete(file: Path) -> None:
    save_file({"w": torch.ones(64, 64)}, file)
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("model.safetensors", incomplete),
        ("model.safetensors", Path.touch),
        ("pytorch_model.bin", lambda file: torch.save({"model": {"w": torch.ones(2)}}, file)),
    ],
    ids=["incomplete", "empty", "tensors in an inner object"],
)
def test_weights_that_cannot_be_read_are_refused_naming_the_folder(tmp_path, name, write):
    # Regression: `merge`, `export` and `certify` on a base whose copy was interrupted ended in a traceback.
    write(tmp_path / name)
    with pytest.raises(BadModel, match=f"{tmp_path}: no model could be loaded") as refused:
        fingerprint(str(tmp_path))
    assert name in str(refused.value)
