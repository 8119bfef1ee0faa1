"""Served folder: its links are removed again, however an engine fails to start."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from atomtune.engines import vllm_serve
from atomtune.engines.served_folder import ServedFolder
from atomtune.engines.vllm_serve import VllmServe
from atomtune.errors import BadModel, BadSettings


@pytest.fixture
def adapter(by_heart, tmp_path) -> Path:
    return Path(shutil.copytree(by_heart, tmp_path / "adapter"))


@pytest.fixture
def left(tmp_path, monkeypatch):
    """`left()` is what stays in the folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return lambda: list(folder.iterdir())


def test_the_links_are_removed_if_a_file_of_the_folder_cannot_be_read(adapter, left):
    (adapter / "generation_config.json").write_text("{")
    served = ServedFolder(adapter, stop_ids=[2])
    with pytest.raises(BadModel, match="generation_config"):
        served.__enter__()
    assert served.view is None and not left()


def test_the_links_are_removed_if_vllm_cannot_serve_the_adapters_rank(adapter, left, monkeypatch):
    """Before the server is started: its command line names the rank."""
    monkeypatch.setattr(vllm_serve, "refuse_without_packages", lambda: None)  # no server is started here
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 1000}))
    base = config["base_model_name_or_path"]
    served = ServedFolder(adapter)
    with pytest.raises(BadSettings, match="up to rank 512"):
        VllmServe(served, base=base, dtype="float32", context=64).__enter__()
    assert served.view is None and not left()
