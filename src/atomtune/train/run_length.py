"""Run length: the steps and epochs of a run, counted as the Trainer counts them."""

import math
from dataclasses import dataclass

from transformers import TrainingArguments


@dataclass(frozen=True)
class RunLength:
    """How long a run is.

    epochs          passes over the records; infinite for a stream, whose records are not counted
    steps_an_epoch  for a stream, all steps
    """

    steps: int
    epochs: float
    steps_an_epoch: int


def run_length(
    records: int | None, args: TrainingArguments, *, batch: int | None = None, epochs: float | None = None
) -> RunLength:
    """The length of a run with this many training records (None: a stream, which ends after --max_steps).

    batch   batch size per process to try; None: that of the arguments
    epochs  number of epochs to try; None: that of the arguments
    Checked against the Trainer itself: tests/train/test_run_length.py.
    """
    if records is None:
        return RunLength(args.max_steps, math.inf, args.max_steps)
    batch = args.per_device_train_batch_size if batch is None else batch
    epochs = args.num_train_epochs if epochs is None else epochs
    of_all_processes = batch * args.world_size
    # An incomplete batch is used or dropped; the last step of an epoch uses the batches that are left.
    batches = records // of_all_processes if args.dataloader_drop_last else math.ceil(records / of_all_processes)
    steps_an_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(epochs * steps_an_epoch)
    return RunLength(steps, steps / steps_an_epoch, steps_an_epoch)
