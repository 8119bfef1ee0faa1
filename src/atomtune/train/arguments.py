"""Arguments: the settings as the Trainer's own, fitted to this machine."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from atomtune.disk import numbered
from atomtune.errors import BadSettings
from atomtune.settings.train_settings import TrainSettings
from atomtune.train.ranks import join_job

#: The Trainer's name for recomputing activations; renamed in transformers 5.23.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in dataclasses.fields(TrainingArguments)}
)


def trainer_arguments(settings: TrainSettings) -> TrainingArguments:
    """TrainingArguments from the settings. Raises BadSettings with what the library itself refuses."""
    values = dict(settings.trainer)
    values.pop("resume_from_checkpoint", None)  # ours
    values["output_dir"] = values.get("output_dir") or str(spare_folder(settings))
    eval_size = settings.data.eval_size
    evaluates, may_evaluate = bool(settings.data.eval_path or eval_size), eval_size is None
    if not evaluates and not may_evaluate and (asked := needs_records(settings)):
        raise BadSettings([f"{asked} needs records to evaluate on: --eval_path or --eval_size."])
    _fit_evaluation(values, evaluates=evaluates, may_evaluate=may_evaluate)
    values |= {
        "remove_unused_columns": False,  # ours are read by our collator
        "disable_tqdm": True,  # train.progress draws the bar
        "logging_nan_inf_filter": False,  # a loss that is not finite ends the run, it is not hidden
    }
    values.setdefault("ddp_find_unused_parameters", False)  # every adapter weight has a gradient in every step
    if settings.data.streaming:  # each rank reads the stream and takes its part: a batch holds more than tensors
        values["accelerator_config"] = {"dispatch_batches": False, **(values.get("accelerator_config") or {})}
    _fit_device(values, streaming=settings.data.streaming)
    if values.get("use_cpu") and values.get("ddp_backend") in (None, "gloo"):
        join_job(values.get("ddp_timeout", TrainingArguments.ddp_timeout))
    try:
        args = TrainingArguments(**values)
        for tracker in get_reporting_integration_callbacks(args.report_to):  # refuses one that it does not know
            tracker()  # and one that is not installed
    # A name of a file that is not there, a key that a table lacks: each setting has its own way.
    except (ValueError, TypeError, ImportError, RuntimeError, OSError, LookupError, AttributeError) as error:
        raise BadSettings([f"The Trainer refuses these settings: {error}"]) from error
    if args.n_gpu > 1:
        # One process and several GPUs would mean nn.DataParallel, which splits a batch's rows apart.
        args._n_gpu = 1
    return args


def needs_records(settings: TrainSettings) -> str:
    """The settings that do nothing, or end the run, where no record is held out; "" where there are none."""
    trainer, patience = settings.trainer, settings.run.early_stopping_patience
    strategy = trainer.get("eval_strategy") or "no"
    names = [f"--eval_strategy {strategy}"] if strategy != "no" else []
    names += [f"--{name}" for name in ("eval_on_start", "load_best_model_at_end") if trainer.get(name)]
    names += [f"--early_stopping_patience {patience}"] if patience else []
    return ", ".join(names)


def _fit_evaluation(values: dict[str, Any], *, evaluates: bool, may_evaluate: bool) -> None:
    """Evaluate where there are records for it, by default so that checkpoints can be compared.

    may_evaluate  whether records are held out is decided when they are read (train/defaults.py)
    """
    if evaluates or (may_evaluate and values.get("load_best_model_at_end")):
        saves = "save_steps" in values and values.get("save_strategy", "steps") == "steps"
        if values.get("load_best_model_at_end") and saves and "eval_strategy" not in values:
            values["eval_strategy"] = "steps"
            values.setdefault("eval_steps", values["save_steps"])
        values.setdefault("eval_strategy", "epoch")
        if values.get("load_best_model_at_end") and not saves:
            values.setdefault("save_strategy", values["eval_strategy"])
    if values.get("metric_for_best_model") is not None:
        values.setdefault("greater_is_better", False)  # the library guesses by name, and guesses perplexity wrong


def _fit_device(values: dict[str, Any], *, streaming: bool) -> None:
    """Number formats and data loading that suit what this machine computes on."""
    if not torch.accelerator.is_available():
        values["use_cpu"] = True  # else a launcher's ranks would not know of each other
    if values.get("use_cpu"):
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision != "no":
            problem = f"the environment has ACCELERATE_MIXED_PRECISION={precision}; on a CPU --dtype alone decides."
            raise BadSettings([f"{problem} `unset ACCELERATE_MIXED_PRECISION`."])
        # On a CPU the dtype of the base says all; the Trainer would refuse bf16 and ignore fp16 in silence.
        values |= {"fp16": False, "bf16": False, "dataloader_pin_memory": False}
        return
    _feed_the_gpu(values, streaming=streaming)
    if values.get("bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
        values["bf16"] = False


def _feed_the_gpu(values: dict[str, Any], *, streaming: bool) -> None:
    """Defaults by which a GPU does not wait for its next batch."""
    # Rows of a new length every step would leave holes in memory: 1.8 times the used was reserved.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not streaming:  # a stream notes what it read where the run can see it: in this process
        values.setdefault("dataloader_num_workers", 1)  # the next batch is collated while the GPU computes
    config = values.get("accelerator_config") or {}
    if values.get("dataloader_pin_memory", True) and isinstance(config, dict):  # a user's file says what it says
        values["accelerator_config"] = {"non_blocking": True, **config}


def spare_folder(settings: TrainSettings) -> Path:
    """runs/<name>-<n>, the first that does not exist.

    A launcher's ranks agree: each looks before it meets the others, and none makes a folder before that.
    """
    stem = "demo" if settings.demo else Path(settings.data.dataset_paths[0]).stem
    return numbered(Path("runs") / (stem or "run"))


def lengths(args: TrainingArguments) -> dict[str, Any]:
    """How long the run is to be."""
    return {"max_steps": args.max_steps, "num_train_epochs": args.num_train_epochs}


def lengths_asked(settings: TrainSettings) -> dict[str, Any]:
    """How long the run was asked to be; None for epochs that are left to it."""
    trainer = settings.trainer
    return {"max_steps": trainer.get("max_steps", -1), "num_train_epochs": trainer.get("num_train_epochs")}
