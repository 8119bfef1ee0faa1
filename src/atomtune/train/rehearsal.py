"""Rehearsal: tries on small objects what a library would only refuse later, before data and model are read."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from atomtune import container
from atomtune.choices import MODEL_CONFIG
from atomtune.data.reading.sources import among_records, refuse_missing_sources
from atomtune.errors import BadSettings
from atomtune.hub_reach import endpoint_shown
from atomtune.model import liger
from atomtune.model.adapter import expert_tensors
from atomtune.model.load import read_config
from atomtune.model.load_errors import explained
from atomtune.model.lora_targets import ALL_LINEAR, match_targets
from atomtune.model.weight_sizes import without_weights
from atomtune.settings.run_settings import LoraSettings, ModelSettings
from atomtune.settings.train_settings import TrainSettings
from atomtune.train.checkpoint.start import foreign_files
from atomtune.train.layout import layout_problems, why_padded_by_settings
from atomtune.train.model import liger_circumstances

#: With more workers per core, a machine would spend its time starting processes.
_WORKERS_A_CORE = 16
STEPS = 20  # length of the rehearsed schedule; the run's own is not known yet

#: Errors that optimizers and schedules raise for arguments they cannot use.
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, ImportError, ArithmeticError, NotImplementedError)


def rehearse(settings: TrainSettings, args: TrainingArguments) -> None:
    """Raise an error for every setting that would end the run only after data and model are read.

    Raises BadSettings with all of these settings, BadModel if the path is not a base, BadData if there are no records.
    """
    if problems := [
        *_folder_problems(settings, Path(args.output_dir)),
        *_optimizer_problems(args),
        *_hub_problems(args),
        *liger.problems(liger_circumstances(settings.trainer, args)),
        *_problems_of_many_processes(args),
        *layout_problems(settings.data.layout, why_padded_by_settings(args)),
        *_worker_problems(args),
        *_problems_of_steps(settings, args),
    ]:
        raise BadSettings(problems)
    if not Path(args.output_dir).exists():  # a run that already finished needs no records for its message
        refuse_missing_sources(settings.data.sources)
    if settings.lora.lora_targets == [ALL_LINEAR] and not settings.lora.lora_experts:
        read_config(str(settings.model.model_path), trust_remote_code=settings.model.trust_remote_code)
    else:
        check_targets(settings.model, settings.lora)


def _problems_of_many_processes(args: TrainingArguments) -> Iterator[str]:
    """How accelerate's settings would give the processes of a run other batches than those that are counted."""
    if args.world_size <= 1:
        return
    if args.accelerator_config.dispatch_batches:
        yield (
            "--accelerator_config dispatch_batches: the first process cannot send our batches to the others, because "
            "they hold more than tensors. Leave it out: each process reads its own part."
        )
    if args.accelerator_config.split_batches:
        yield (
            "--accelerator_config split_batches: --per_device_train_batch_size is what each process gets, and is not "
            f"split again. Leave it out, and divide the batch by {args.world_size} yourself."
        )


def _folder_problems(settings: TrainSettings, folder: Path) -> Iterator[str]:
    """Why a run cannot write to this folder: it holds a model, files of the user, or the records themselves."""
    if (folder / MODEL_CONFIG).is_file():
        yield (
            f"--output_dir {folder} holds a model (config.json), whose tokenizer and README.md the run would replace. "
            "Pass another folder."
        )
    elif own := foreign_files(folder):
        yield f"--output_dir {folder} holds {', '.join(own)}, which the run would replace. Pass another folder."
    yield from among_records(settings.data.sources, folder)


def _worker_problems(args: TrainingArguments) -> Iterator[str]:
    """Problems with the processes that prepare batches."""
    cores = container.cores()
    most_workers = _WORKERS_A_CORE * cores
    if args.dataloader_num_workers > most_workers:
        yield (
            f"--dataloader_num_workers {args.dataloader_num_workers:,}: at most {most_workers} on a machine of "
            f"{cores} cores. 1 or 2 keep a GPU busy."
        )
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        # The second one is missing in older transformers.
        if getattr(args, name, None) and not args.dataloader_num_workers:
            yield f"--{name} needs --dataloader_num_workers of 1 or more."


def _problems_of_steps(settings: TrainSettings, args: TrainingArguments) -> Iterator[str]:
    """Ways to make a step that cannot be used here."""
    if args.fsdp and args.world_size <= 1:
        yield "--fsdp is not used here: it needs several processes on GPUs. Leave it out."
    if args.deepspeed and settings.run.skip_nonfinite:
        # its engine makes the update within the backward pass, before a loss can be looked at
        yield "--skip_nonfinite: DeepSpeed has changed the weights before a step can be skipped. Leave it out."
    if args.auto_find_batch_size:
        # the library would start again at step 0 with the weights and the optimizer of the steps already made
        yield (
            "--auto_find_batch_size: it would repeat steps on weights that these steps have already changed. Leave it "
            "out, and pass a smaller --per_device_train_batch_size; `atomtune plan` computes which one fits."
        )
    if args.torch_compile:
        # torch.compile does not support the attention over rows, and every batch has another length.
        yield (
            "--torch_compile: rows of many records cannot be compiled, and padded ones would be compiled again for "
            "each new length. Leave it out."
        )


def _optimizer_problems(args: TrainingArguments) -> Iterator[str]:
    """Problems of the optimizer, tried on one weight, and of its schedule, tried to the last step."""
    model = nn.Linear(1, 1)
    optim, lr_scheduler_type = args.optim.value, args.lr_scheduler_type.value
    try:
        optimizer_class, arguments = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.optim_args and not _is_changed_by(args, arguments, model):
            yield f"--optim_args {args.optim_args!r}: --optim {optim} takes none of these. Leave it out."
        # Some optimizers have their own list of weights, chosen from the model.
        weights = {} if {"params", "model", "optimizer_dict"} & arguments.keys() else {"params": model.parameters()}
        optimizer = optimizer_class(**weights, **arguments)
    except _REFUSALS as error:
        optim_args = f" --optim_args {args.optim_args!r}" if args.optim_args else ""
        yield f"--optim {optim}{optim_args}: {error}"
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    steps = args.max_steps if 0 < args.max_steps < STEPS else STEPS
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        begin_training = getattr(optimizer, "train", None)
        if callable(begin_training):  # schedule_free_* needs this before the first step
            begin_training()
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):  # other schedules need a loss for every step
            for _ in range(steps):
                optimizer.step()
                schedule.step()
    except _REFUSALS as error:
        kwargs = f" --lr_scheduler_kwargs '{args.lr_scheduler_kwargs}'" if args.lr_scheduler_kwargs else ""
        yield f"--lr_scheduler_type {lr_scheduler_type}{kwargs}: {error}"


def _is_changed_by(args: TrainingArguments, arguments: dict[str, Any], model: nn.Module) -> bool:
    """Whether --optim_args changes the optimizer's arguments; most optimizers ignore it, without an error."""
    plain = copy.copy(args)
    plain.optim_args = None
    try:
        others = Trainer.get_optimizer_cls_and_kwargs(plain, model)[1]
    except _REFUSALS:
        return True  # the optimizer cannot be made without them
    return repr({**arguments, "params": None}) != repr({**others, "params": None})  # the weights differ in every call


def _hub_problems(args: TrainingArguments) -> Iterator[str]:
    """Whether the hub accepts the user's login; asks without changing anything there."""
    if not args.push_to_hub or args.process_index:
        return
    later = "Leave it out; a finished adapter can be uploaded later: hf upload OWNER/NAME FOLDER"
    endpoint = endpoint_shown()
    try:
        HfApi().whoami(token=args.hub_token)
    except LocalTokenNotFoundError:
        yield f"--push_to_hub: not logged in to the hub. Run hf auth login, or set HF_TOKEN. {later}"
    except HfHubHTTPError as error:
        status = error.response.status_code
        yield f"--push_to_hub: the hub at {endpoint} does not accept this login ({status}). Run hf auth login. {later}"
    except (OfflineModeIsEnabled, HTTPError, OSError):
        yield f"--push_to_hub: the hub at {endpoint} cannot be reached. {later}"


def check_targets(model: ModelSettings, lora: LoraSettings) -> None:
    """Raise BadSettings if a target matches no layer or one that LoRA cannot adapt, or if experts are missing.

    The model is built without weights, which takes a second at most.
    """
    config = read_config(str(model.model_path), trust_remote_code=model.trust_remote_code)
    with explained(str(model.model_path), "model", files=MODEL_CONFIG):
        base = without_weights(config, trust_remote_code=model.trust_remote_code)
    match_targets(base, lora.lora_targets)
    if lora.lora_experts:
        expert_tensors(base, lora.lora_targets)


def check_last_batch(args: TrainingArguments, records: int) -> None:
    """Raise BadSettings if the last batch would end the run, or is all there is and dropped.

    Without accelerate's even_batches, processes with different numbers of batches wait for each other in vain at the
    end of an epoch.
    """
    batches = math.ceil(records / args.per_device_train_batch_size)
    fills = args.accelerator_config.even_batches or args.dataloader_drop_last
    if args.world_size > 1 and not fills and batches % args.world_size:
        raise BadSettings(
            [
                f"--accelerator_config even_batches false: {records:,} records make {batches:,} batches, which "
                f"{args.world_size} processes cannot share evenly, so the epoch would never end. Leave it out, or pass "
                "--dataloader_drop_last."
            ]
        )
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and records < batch:
        raise BadSettings(
            [
                f"--dataloader_drop_last leaves out a batch that is not full, and {records:,} records do not fill one "
                f"of {batch:,}. Leave it out, or pass a smaller --per_device_train_batch_size."
            ]
        )
