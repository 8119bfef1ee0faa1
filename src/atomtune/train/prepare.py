"""Prepare: the data and the model of one run, read, checked and said.

Before: run.py decides where to start.  After: trainer.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainingArguments

from atomtune.config import TrainSettings
from atomtune.data.records import Account
from atomtune.data.store import examples_of
from atomtune.data.template import Template
from atomtune.errors import BadData, BadSettings, listing
from atomtune.model.adapter import (
    Card,
    adapter_file,
    match_targets,
    new_adapter,
    parameter_counts,
    start_from_weights,
)
from atomtune.model.fingerprint import refuse_other_base
from atomtune.model.load import device_in_use, load_base, resolve_dtype
from atomtune.model.lowrank import compute_together, families_of
from atomtune.model.memory import should_checkpoint
from atomtune.train.arguments import CHECKPOINTING
from atomtune.train.checkpoint import Start
from atomtune.train.report import RunRecord
from atomtune.voice import Voice


@dataclass(frozen=True)
class Job:
    """What every part of one run shares: what was asked, where it starts, and where it speaks and writes."""

    settings: TrainSettings
    args: TrainingArguments
    start: Start
    before: dict[str, Any]  # the run.json that was here, if any
    voice: Voice
    record: RunRecord


@dataclass(frozen=True)
class Data:
    """What one run learns from and is measured on."""

    train: datasets.Dataset
    evaluate: datasets.Dataset | None
    account: Account
    data_hash: str


# --- data -------------------------------------------------------------------------------------------------------


def read_data(job: Job, template: Template) -> Data:
    """The examples to train and evaluate on; on several ranks the first one encodes, the others read the store."""
    asked, voice = job.settings.data, job.voice

    def read(path: Path) -> tuple[datasets.Dataset, Account, str]:
        size = path.stat().st_size if path.is_file() else 0
        with job.args.main_process_first(), voice.reading(size, f"reading {path.name}") as reading:
            return examples_of(
                path,
                template,
                max_tokens=asked.max_seq_length,
                overlength="skip" if asked.skip_overlength else asked.overlength,
                advance=reading.advance,
            )

    examples, account, data_hash = read(Path(str(asked.dataset_path)))
    job.record.update(data={"path": asked.dataset_path, "sha256": data_hash}, **account.contract())
    _say_account(account, template, voice)
    _refuse_broken(account, asked.dataset_path, skip_bad=asked.skip_bad)
    evaluate = None
    if asked.eval_path:
        evaluate, eval_account, _ = read(Path(asked.eval_path))
        voice.say(f"{Path(asked.eval_path).name}, to evaluate on:")
        _say_account(eval_account, template, voice)
        _refuse_broken(eval_account, asked.eval_path, skip_bad=asked.skip_bad)
    elif asked.eval_size:
        held = round(asked.eval_size * len(examples)) if asked.eval_size < 1 else int(asked.eval_size)
        if not 0 < held < len(examples):
            raise BadSettings([f"--eval_size {asked.eval_size:g} holds out {held} of {len(examples)} records."])
        parts = examples.train_test_split(test_size=held, seed=job.args.data_seed or job.args.seed)
        examples, evaluate = parts["train"], parts["test"]
        voice.say(f"{len(evaluate):,} records are held out to evaluate on, {len(examples):,} to train on.")
    return Data(examples, evaluate, account, data_hash)


def _say_account(account: Account, template: Template, voice: Voice) -> None:
    voice.say(
        f"{account.records_read:,} records read, {account.records_used:,} used, "
        f"{len(account.records_refused):,} refused, {account.records_cut:,} shortened; "
        f"{account.prompt_tokens:,} prompt and {account.target_tokens:,} target tokens; "
        f"template {template.name}, stops at {template.stop}."
    )
    for said, count in account.notices.items():
        voice.notice(f"{said} in {count:,} records.")
    if account.records_copied:
        voice.notice(f"{account.records_copied:,} records are copies of another and are learned once more.")
    if account.cut_origins:
        voice.notice(f"shortened to fit --max_seq_length: {_some(account.cut_origins)}.")
    if account.control_origins:
        voice.notice(f"control strings in the text stay text in: {_some(account.control_origins)}.")
    if account.unknown_tokens:
        voice.notice(f"{account.unknown_tokens:,} target tokens are unknown to this tokenizer and are learned as such.")
    if account.shared_instruction is not None:
        voice.notice("nearly all records share one instruction; it is stored with the adapter as chat's default.")
    refused = [refusal for refusal in account.records_refused if not refusal.broken]
    if refused:
        voice.notice(f"not trained on:\n{listing([f'{r.origin}  {r.reason}' for r in refused], 5)}")


def _some(origins: list[str], shown: int = 5) -> str:
    rest = len(origins) - shown
    return ", ".join(origins[:shown]) + (f" and {rest:,} more (all in run.json)" if rest > 0 else "")


def _refuse_broken(account: Account, path: str | None, *, skip_bad: bool) -> None:
    broken = account.broken
    if broken and not skip_bad:
        good = account.records_read - len(broken)
        raise BadData(
            f"{listing([f'{r.origin}  {r.reason}.' for r in broken])}\n"
            f"{len(broken):,} of {account.records_read:,} records refused (all in run.json)."
            + (f" --skip_bad trains on the other {good:,}." if good else "")
        )
    if not account.records_used:
        first = account.records_refused[0]
        raise BadData(f"{path}: none of {account.records_read:,} records can be used. {first.origin}: {first.reason}.")


# --- model ------------------------------------------------------------------------------------------------------


def dtype_of(job: Job, device: torch.device) -> torch.dtype:
    """The dtype of the base's weights in this run."""
    trainer = job.settings.trainer
    return resolve_dtype(
        job.settings.model.dtype,
        device,
        fp16=bool(trainer.get("fp16")),
        bf16=bool(trainer.get("bf16")),
        notice=job.voice.notice,
    )


def load_model(job: Job, *, longest_tokens: int) -> Any:
    """The base with its adapter, new or filled from the start's weights, on its device."""
    settings, args, start, voice = job.settings, job.args, job.start, job.voice
    model, lora = settings.model, settings.lora
    device = torch.device("cpu") if args.use_cpu else device_in_use()
    dtype = dtype_of(job, device)
    if device.type == "cpu" and settings.trainer.get("bf16") and dtype is not torch.bfloat16:
        voice.notice(f"--bf16 is not used: on a CPU --dtype {model.dtype} alone decides.")
    if device.type == "cuda" and torch.cuda.device_count() > 1 and args.world_size == 1 and not model.device_map:
        voice.notice(
            f"{torch.cuda.device_count()} GPUs are here and this process uses one. All of them: "
            f"torchrun --nproc_per_node {torch.cuda.device_count()} -m atomtune train …"
        )
    voice.say(f"loading {model.model_path} …")
    base = load_base(
        str(model.model_path),
        dtype=dtype,
        device=device,
        device_map=model.device_map,
        quantize=model.quantize,
        trust_remote_code=model.trust_remote_code,
    )
    if start.path is not None:
        card = Card.load(start.path if start.path.is_dir() else start.path.parent)
        refuse_other_base(
            str(model.model_path),
            card.base if card else "",
            anyway=start.kind == "weights" or settings.run.resume_anyway,
            notice=voice.notice,
        )
    _check_positions(base, longest_tokens)
    if start.path is not None:
        file = adapter_file(start.path)
        if file is None:
            raise BadSettings([f"{start.path}: no adapter weights in this checkpoint."])
        adapted: Any = start_from_weights(
            base,
            file,
            rank=lora.lora_rank,
            alpha=lora.lora_alpha,
            dropout=lora.lora_dropout,
            targets=lora.lora_targets,
            notice=voice.notice,
        )
    else:
        counts = match_targets(base, lora.lora_targets)
        voice.say(f"LoRA on {', '.join(f'{name} ({count})' for name, count in counts.items())}")
        adapted = new_adapter(
            base, rank=lora.lora_rank, alpha=lora.lora_alpha, dropout=lora.lora_dropout, targets=lora.lora_targets
        )
    trainable, total = parameter_counts(adapted)
    voice.say(
        f"{model.model_path} in {str(dtype).removeprefix('torch.')}{f', {model.quantize}' if model.quantize else ''} "
        f"on {device}: {trainable:,} of {total:,} parameters are trained ({100 * trainable / total:.2f} %)."
    )
    if not (args.fsdp or args.deepspeed):  # they take the weights out of the layers between calls
        some = torch.zeros(1, 2, dtype=torch.long, device=base.get_input_embeddings().weight.device)
        compute_together(families_of(adapted, input_ids=some))
    _set_checkpointing(job, adapted, longest_tokens=longest_tokens, dtype=dtype, device=device)
    return adapted


def _check_positions(base: Any, longest_tokens: int) -> None:
    text = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    positions = getattr(text, "max_position_embeddings", None)
    if positions and longest_tokens > positions:
        raise BadSettings(
            [
                f"The longest example has {longest_tokens} tokens; this model has {positions} positions.\n"
                f"Pass --max_seq_length {positions} or less."
            ]
        )


def _set_checkpointing(job: Job, model: Any, *, longest_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    args, asked = job.args, job.settings.run.gradient_checkpointing
    wanted = bool(getattr(args, CHECKPOINTING)) or asked == "true"
    if not wanted and asked == "auto":
        tokens = args.per_device_train_batch_size * longest_tokens
        wanted = should_checkpoint(model.config, tokens=tokens, element_bytes=dtype.itemsize, device=device)
        if wanted:
            job.voice.notice("activations are recomputed to save memory (--gradient_checkpointing false keeps them).")
    setattr(args, CHECKPOINTING, wanted)
    if wanted:
        kwargs = getattr(args, f"{CHECKPOINTING}_kwargs") or {}
        setattr(args, f"{CHECKPOINTING}_kwargs", {"use_reentrant": False, **kwargs})
        model.enable_input_require_grads()
