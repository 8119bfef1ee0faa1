"""Modes: a context that changes a model restores it, also after an error."""

import pytest
import torch

from atomtune.data.encoding.choose_template import load_template
from atomtune.model.generate import answer_ids
from atomtune.model.load import BaseSpec, load_base, load_tokenizer
from atomtune.model.modes import without_dropout


def test_without_dropout_restores_the_training_mode_of_each_module():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout(), torch.nn.Linear(2, 2)).train()
    model[1].eval()
    with pytest.raises(RuntimeError, match="inside"), without_dropout(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert [module.training for module in model] == [True, False, True]
    assert model.training


def test_an_interrupted_generation_leaves_the_model_in_training_mode(models):
    path = str(models("llama"))
    model = load_base(BaseSpec(path=path, dtype=torch.float32, device=torch.device("cpu"))).train()

    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_ids(
            model,
            load_template("auto", load_tokenizer(path)),
            [{"role": "user", "content": "hi"}],
            stop_early=interrupted,
        )
    assert model.training
