"""A run has as many steps as transformers' own Trainer makes."""

import math

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from transformers import Trainer, TrainingArguments

from atomtune.train.run_length import RunLength, run_length


class OneWeight(torch.nn.Module):
    """The smallest model for a Trainer."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, labels=None):
        return {"loss": (self.weight * x - labels).square().mean()}


def trainer_of(folder, records: int, **values) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_strategy="no", **values,
    )  # fmt: skip
    data = [{"x": torch.tensor(1.0), "labels": torch.tensor(0.5)}] * records
    return Trainer(OneWeight(), args, train_dataset=data)


#: (records, batch, accumulated, epochs, max_steps): with complete and incomplete last batches and steps.
RUNS = [
    (12, 4, 1, 2, -1), (13, 4, 1, 1.5, -1), (13, 4, 2, 1, -1), (13, 4, 2, 2.5, -1), (17, 4, 4, 3, -1),
    (3, 4, 1, 2, -1), (9, 2, 3, 1, 4), (9, 2, 3, 1, 1), (5, 5, 8, 2, -1), (13, 4, 2, 1, 7),
]  # fmt: skip


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("records", "batch", "accumulated", "epochs", "max_steps"), RUNS)
def test_run_length_matches_the_steps_and_epochs_of_the_trainer(
    tmp_path, *, records, batch, accumulated, epochs, max_steps, drop_last
):
    if drop_last and records < batch:
        pytest.skip("refused before a run begins: no batch is full")
    trainer = trainer_of(
        tmp_path, records, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        num_train_epochs=epochs, max_steps=max_steps, dataloader_drop_last=drop_last,
    )  # fmt: skip
    length = run_length(records, trainer.args)
    trainer.train()
    assert length.steps == trainer.state.global_step
    assert length.epochs == pytest.approx(trainer.state.global_step / length.steps_an_epoch)
    # With max_steps, the Trainer reports the number of epochs rounded up.
    assert trainer.state.num_train_epochs == math.ceil(length.epochs if max_steps > 0 else epochs)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("records", "batch", "accumulated"), [(24, 4, 1), (13, 2, 2), (25, 4, 2), (31, 1, 3)])
def test_run_length_with_several_processes_matches_the_trainer(
    tmp_path, monkeypatch, *, records, batch, accumulated, drop_last, processes
):
    trainer = trainer_of(
        tmp_path, records, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        num_train_epochs=2, dataloader_drop_last=drop_last,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(trainer.train_dataset, batch_size=batch, drop_last=drop_last)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda _: processes))
    for rank in range(processes):
        of_rank = prepare_data_loader(loader, num_processes=processes, process_index=rank)
        steps = trainer.set_initial_training_values(trainer.args, of_rank)[-1]
        assert run_length(records, trainer.args).steps == steps


def test_a_streamed_run_has_max_steps_and_unlimited_epochs(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=7)
    assert run_length(None, args) == RunLength(steps=7, epochs=math.inf, steps_an_epoch=7)


def test_explicit_batch_and_epochs_override_the_training_arguments(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=1, num_train_epochs=1)
    assert run_length(10, args, batch=5, epochs=3) == RunLength(steps=6, epochs=3, steps_an_epoch=2)
