"""A config is compared with the weight files before memory is allocated."""

import json
import shutil

import pytest
import torch

from atomtune.errors import BadModel
from atomtune.model.load import BaseSpec, load_base
from tests.steps import steps_of


def altered(models, folder, **values) -> BaseSpec:
    shutil.copytree(models("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return BaseSpec(path=str(folder), dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 9_999},
        {"vocab_size": 10**9},
        {"hidden_size": 2**20},
        {"intermediate_size": 10**8},
        {"num_key_value_heads": 10**6},
        {"num_hidden_layers": 15},
    ],
    ids=str,
)
def test_a_model_larger_than_its_files_is_refused_at_once(models, tmp_path, values):
    spec = altered(models, tmp_path / "m", **values)

    def refused() -> None:
        with pytest.raises(BadModel, match=r"config\.json describes another model than the weight files hold"):
            load_base(spec)

    assert steps_of(refused) < 300_000  # building 9,999 layers takes millions


def test_a_size_that_differs_a_little_is_named_with_both_shapes(models, tmp_path):
    with pytest.raises(BadModel) as raised:
        load_base(altered(models, tmp_path / "m", intermediate_size=65))
    assert "model.layers.0.mlp.down_proj.weight: (32, 64) in the weight files, (32, 65) in the model" in str(
        raised.value
    )
