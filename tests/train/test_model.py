"""When a run replays its steps as CUDA graphs. A CPU records none, so the recorder is a stand-in."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atomtune.train import model as train_model
from atomtune.train.model import step_graphs
from tests.model.test_listed_modules import Model


def run_on_a_gpu(**changed: Any) -> Any:
    args = {"world_size": 1, "fsdp": [], "deepspeed": None, "label_smoothing_factor": 0.0, "mixed_precision": "no"}
    args |= {train_model.CHECKPOINTING: False, "use_cpu": False}
    return SimpleNamespace(
        args=SimpleNamespace(**{**args, **changed}),
        settings=SimpleNamespace(
            run=SimpleNamespace(cuda_graphs=True),
            model=SimpleNamespace(device_map=None),
        ),
        console=SimpleNamespace(notice=print),
    )


@pytest.mark.parametrize(
    ("changed", "records"),
    [
        ({}, True),
        # A recording's backward pass ends before the scale is applied, so small float16 gradients in it became zero.
        ({"mixed_precision": "fp16"}, False),
        # A replay has its gradients already, so the ranks would not average them.
        ({"world_size": 2}, False),
        # Recomputing reads the random generator's state, which cannot be recorded.
        ({train_model.CHECKPOINTING: True}, False),
    ],
    ids=str,
)
def test_steps_are_recorded_only_where_a_replay_trains_as_the_model_does(monkeypatch, changed, records):
    monkeypatch.setattr(train_model, "device_in_use", lambda: torch.device("cuda"))
    monkeypatch.setattr(train_model, "GpuRecorder", lambda device: None)
    assert (step_graphs(run_on_a_gpu(**changed), Model()) is not None) is records
