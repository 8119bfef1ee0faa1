"""Prepare: the model of one run, loaded, adapted, checked and said.

Before: data.py has read the records.  After: trainer.py.
"""

from typing import Any

import torch

from atomtune.errors import BadSettings
from atomtune.model.adapter import LoraSpec, new_adapter, parameter_counts, start_from_weights
from atomtune.model.adapter_folder import AdapterMetadata, adapter_file
from atomtune.model.fingerprint import refuse_other_base
from atomtune.model.fused_lora import compute_together
from atomtune.model.load import BaseSpec, device_in_use, load_base, resolve_dtype
from atomtune.model.lora_targets import match_targets
from atomtune.model.memory import should_checkpoint
from atomtune.train.arguments import CHECKPOINTING
from atomtune.train.run_context import Job


def dtype_of(job: Job, device: torch.device) -> torch.dtype:
    """The dtype of the base's weights in this run."""
    trainer = job.settings.trainer
    return resolve_dtype(
        job.settings.model.dtype,
        device,
        fp16=bool(trainer.get("fp16")),
        bf16=bool(trainer.get("bf16")),
        notice=job.console.notice,
    )


def load_model(job: Job, *, longest_tokens: int) -> Any:
    """The base with its adapter, new or filled from the start's weights, on its device."""
    settings, args, start, console = job.settings, job.args, job.start, job.console
    model, lora = settings.model, LoraSpec(**settings.lora.lora())
    device = torch.device("cpu") if args.use_cpu else device_in_use()
    dtype = dtype_of(job, device)
    if device.type == "cpu" and settings.trainer.get("bf16") and dtype is not torch.bfloat16:
        console.notice(f"--bf16 is not used: on a CPU --dtype {model.dtype} alone decides.")
    if device.type == "cuda" and torch.cuda.device_count() > 1 and args.world_size == 1 and not model.device_map:
        console.notice(
            f"{torch.cuda.device_count()} GPUs are here and this process uses one. All of them: "
            f"torchrun --nproc_per_node {torch.cuda.device_count()} -m atomtune train …"
        )
    console.say(f"loading {model.model_path} …")
    base = load_base(BaseSpec(**model.base(), dtype=dtype, device=device))
    if start.path is not None:
        metadata = AdapterMetadata.load(start.path if start.path.is_dir() else start.path.parent)
        refuse_other_base(
            str(model.model_path),
            metadata.base if metadata else "",
            anyway=start.kind == "weights" or settings.run.resume_anyway,
            notice=console.notice,
        )
    _check_positions(base, longest_tokens)
    if start.path is not None:
        file = adapter_file(start.path)
        if file is None:
            raise BadSettings([f"{start.path}: no adapter weights in this checkpoint."])
        adapted: Any = start_from_weights(base, file, lora, notice=console.notice)
    else:
        counts = match_targets(base, lora.targets)
        console.say(f"LoRA on {', '.join(f'{name} ({count})' for name, count in counts.items())}")
        adapted = new_adapter(base, lora)
    trainable, total = parameter_counts(adapted)
    console.say(
        f"{model.model_path} in {str(dtype).removeprefix('torch.')}{f', {model.quantize}' if model.quantize else ''} "
        f"on {device}: {trainable:,} of {total:,} parameters are trained ({100 * trainable / total:.2f} %)."
    )
    if not (args.fsdp or args.deepspeed):  # they take the weights out of the layers between calls
        embeddings: Any = base.get_input_embeddings()
        two_tokens = torch.zeros(1, 2, dtype=torch.long, device=embeddings.weight.device)
        compute_together(adapted, input_ids=two_tokens)
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
            job.console.notice("activations are recomputed to save memory (--gradient_checkpointing false keeps them).")
    setattr(args, CHECKPOINTING, wanted)
    if wanted:
        kwargs = getattr(args, f"{CHECKPOINTING}_kwargs") or {}
        setattr(args, f"{CHECKPOINTING}_kwargs", {"use_reentrant": False, **kwargs})
        model.enable_input_require_grads()
