"""Run length: the steps and epochs of a run, counted as the Trainer counts them."""

import math
from dataclasses import dataclass

from transformers import TrainingArguments


@dataclass(frozen=True)
class RunLength:
    """How long a run is.

    epochs          how often its steps go through the records; without end for a stream, whose records nobody counts
    steps_an_epoch  all steps of a stream
    """

    steps: int
    epochs: float
    steps_an_epoch: int


def run_length(
    records: int | None, args: TrainingArguments, *, batch: int | None = None, epochs: float | None = None
) -> RunLength:
    """The length of a run with so many records to learn; None for a stream, which ends after --max_steps.

    batch   records of a batch of one process, while that is still being chosen; else what the arguments say
    epochs  the same of num_train_epochs
    Checked against the Trainer itself: tests/train/test_run_length.py.
    """
    if records is None:
        return RunLength(args.max_steps, math.inf, args.max_steps)
    batch = args.per_device_train_batch_size if batch is None else batch
    epochs = args.num_train_epochs if epochs is None else epochs
    of_all_processes = batch * args.world_size
    # A batch that the records do not fill is left out or not; the last step of an epoch has what batches are left.
    batches = records // of_all_processes if args.dataloader_drop_last else math.ceil(records / of_all_processes)
    steps_an_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(epochs * steps_an_epoch)
    return RunLength(steps, steps / steps_an_epoch, steps_an_epoch)
