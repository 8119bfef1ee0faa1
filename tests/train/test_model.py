"""When a run replays its steps as CUDA graphs. A CPU records none, so the recorder is a stand-in."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atomtune.train import model as train_model
from atomtune.train.model import step_graphs
from tests.model.test_few_walks import Model


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


@pytest.mark.parametrize(("changed", "records"), [({}, True), ({"mixed_precision": "fp16"}, False)], ids=str)
def test_with_a_loss_scale_no_step_is_recorded(monkeypatch, changed, records):
    # A recording's backward pass ended before the scale was applied, so small float16 gradients in it became zero.
    monkeypatch.setattr(train_model, "device_in_use", lambda: torch.device("cuda"))
    monkeypatch.setattr(train_model, "GpuRecorder", lambda device: None)
    assert (step_graphs(run_on_a_gpu(**changed), Model()) is not None) is records
