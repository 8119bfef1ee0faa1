"""Arguments: the settings as TrainingArguments, adapted to this machine."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from atomtune.errors import BadSettings
from atomtune.folders import numbered
from atomtune.settings.contradictions import FOLLOWS_THE_LOSS, needs_evaluations
from atomtune.settings.train_settings import TrainSettings
from atomtune.train.ranks import join_job

#: The Trainer's name for recomputing activations, which transformers 5.23 renamed.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in dataclasses.fields(TrainingArguments)}
)


def trainer_arguments(settings: TrainSettings) -> TrainingArguments:
    """TrainingArguments from the settings. Raises BadSettings with the library's message if it rejects them."""
    values = dict(settings.trainer)
    values.pop("resume_from_checkpoint", None)  # handled by atomtune (train/checkpoint)
    values["output_dir"] = values.get("output_dir") or str(spare_folder(settings))
    eval_size = settings.data.eval_size
    evaluates, may_evaluate = bool(settings.data.eval_path or eval_size), eval_size is None
    if not evaluates and not may_evaluate and (setting := needs_records(settings)):
        raise BadSettings([f"{setting} needs records to evaluate on: --eval_path or --eval_size."])
    _fit_evaluation(values, evaluates=evaluates, may_evaluate=may_evaluate)
    values |= {
        "remove_unused_columns": False,  # our collator reads our own columns
        "disable_tqdm": True,  # train.progress draws the bar
        "logging_nan_inf_filter": False,  # a loss that is not finite ends the run instead of being hidden
        # A resumed run restores its own counts; the library would put other objects in the place of its callbacks.
        "restore_callback_states_from_checkpoint": False,
        "enable_jit_checkpoint": False,  # every run saves a checkpoint when it is stopped, on SIGTERM too
    }
    values.setdefault("log_level_replica", "passive")  # otherwise all processes but the first print more than that one
    # Every adapter weight gets a gradient in every step. Where that is not so, train/run.py sets it to True.
    values.setdefault("ddp_find_unused_parameters", False)
    # Each rank reads the stream and takes its part, because batches do not hold only tensors
    if settings.data.streaming:
        values["accelerator_config"] = {"dispatch_batches": False, **(values.get("accelerator_config") or {})}
    _fit_device(values, streaming=settings.data.streaming)
    if values.get("use_cpu") and values.get("ddp_backend") in (None, "gloo"):
        join_job(values.get("ddp_timeout", TrainingArguments.ddp_timeout))
    try:
        args = TrainingArguments(**values)
        for tracker in get_reporting_integration_callbacks(args.report_to):  # raises for an unknown tracker
            tracker()  # raises if its package is not installed
    # For example a file that does not exist, or a key missing in a dict: each setting fails in its own way.
    except (ValueError, TypeError, ImportError, RuntimeError, OSError, LookupError, AttributeError) as error:
        raise BadSettings([f"The Trainer refuses these settings: {error}"]) from error
    if args.n_gpu > 1:
        # With one process and several GPUs the Trainer would use nn.DataParallel, which would split the rows of a
        # batch.
        args._n_gpu = 1
    return args


def needs_records(settings: TrainSettings) -> str:
    """Settings that have no effect, or end the run, if no record is held out, as a list for a message; "" if none."""
    trainer = settings.trainer
    strategy = trainer.get("eval_strategy") or "no"
    names = [f"--eval_strategy {strategy}"] if strategy != "no" else []
    names += [f"--{name}" for name in ("eval_on_start", "load_best_model_at_end") if trainer.get(name)]
    names += needs_evaluations({**trainer, "early_stopping_patience": settings.run.early_stopping_patience})
    return ", ".join(names)


def _fit_evaluation(values: dict[str, Any], *, evaluates: bool, may_evaluate: bool) -> None:
    """Turn evaluation on if there are records for it, at intervals that let checkpoints be compared.

    may_evaluate  whether records may be held out later, when they are read (train/defaults.py)
    """
    needs_strategy = values.get("load_best_model_at_end") or values.get("lr_scheduler_type") in FOLLOWS_THE_LOSS
    if evaluates or (may_evaluate and needs_strategy):
        saves = "save_steps" in values and values.get("save_strategy", "steps") == "steps"
        if values.get("load_best_model_at_end") and saves and "eval_strategy" not in values:
            values["eval_strategy"] = "steps"
            values.setdefault("eval_steps", values["save_steps"])
        values.setdefault("eval_strategy", "epoch")
        if values.get("load_best_model_at_end") and not saves:
            values.setdefault("save_strategy", values["eval_strategy"])
    if values.get("save_strategy") == "best":
        values.setdefault("metric_for_best_model", "loss")
    if values.get("metric_for_best_model") is not None:
        values.setdefault("greater_is_better", False)  # the library's guess from the name is wrong for perplexity


def _fit_device(values: dict[str, Any], *, streaming: bool) -> None:
    """Set number formats and data loading that suit the device."""
    if not torch.accelerator.is_available():
        values["use_cpu"] = True  # otherwise the ranks of a launcher would not connect
    if values.get("use_cpu"):
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision != "no":
            problem = f"the environment has ACCELERATE_MIXED_PRECISION={precision}; on a CPU --dtype alone decides."
            raise BadSettings([f"{problem} `unset ACCELERATE_MIXED_PRECISION`."])
        # On a CPU only the dtype of the base matters; the Trainer would refuse bf16 and silently ignore fp16.
        values |= {"fp16": False, "bf16": False, "dataloader_pin_memory": False}
        return
    _feed_the_gpu(values, streaming=streaming)
    if values.get("bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
        values["bf16"] = False


def _feed_the_gpu(values: dict[str, Any], *, streaming: bool) -> None:
    """Set defaults so that a GPU does not wait for its next batch."""
    # Each step's row has another length, which fragments memory: 1.8 times the used memory was reserved.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not streaming:  # streams record what was read in this process
        values.setdefault("dataloader_num_workers", 1)  # the next batch is collated while the GPU computes
    config = values.get("accelerator_config") or {}
    if values.get("dataloader_pin_memory", True) and isinstance(config, dict):  # a user's config file stays as it is
        values["accelerator_config"] = {"non_blocking": True, **config}


def shuffling_seed(args: TrainingArguments) -> int:
    """The seed for the order and the choice of records."""
    return args.seed if args.data_seed is None else args.data_seed


def spare_folder(settings: TrainSettings) -> Path:
    """runs/<name>-<n> with the first n that does not exist.

    All ranks of a launcher choose the same folder: each looks before it connects to the others, and none creates a
    folder before that.
    """
    stem = "demo" if settings.demo else Path(settings.data.dataset_paths[0]).stem
    return numbered(Path("runs") / (stem or "run"))


def lengths(args: TrainingArguments) -> dict[str, Any]:
    """The length of the run: max_steps and num_train_epochs, as in run.json."""
    return {"max_steps": args.max_steps, "num_train_epochs": args.num_train_epochs}


def lengths_set(settings: TrainSettings) -> dict[str, Any]:
    """The length in the user's settings; num_train_epochs is None if it is on auto."""
    trainer = settings.trainer
    return {"max_steps": trainer.get("max_steps", -1), "num_train_epochs": trainer.get("num_train_epochs")}
