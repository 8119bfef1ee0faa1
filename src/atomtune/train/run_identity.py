"""Run identity: what a resumed run must share with the original run, and what may change.

Each checkpoint's manifest stores these values by name, and a resume compares them. All other settings may change: where
and how often the run saves, logs and evaluates, how work is divided within a process, and the run's length (with a
notice).
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from atomtune.choices import MODEL_CONFIG
from atomtune.data.cache_key import tokenizer_text
from atomtune.data.encoding.chat_template import Template
from atomtune.disk import read_json_object
from atomtune.errors import BadSettings
from atomtune.model.adapter_folder import adapter_file
from atomtune.model.fingerprint import folder_of, weight_files
from atomtune.train.checkpoint.atomic import facts_in, read_manifest
from atomtune.train.dataset import Data
from atomtune.train.run_context import RunContext
from atomtune.train.run_report import read_record

#: Settings of the Trainer that change the numbers a run computes.
TRAINER_SETTINGS = (
    "seed",
    "data_seed",
    "full_determinism",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "train_sampling_strategy",
    "accelerator_config",
    "ignore_data_skip",
    "group_by_length",
    "dataloader_drop_last",
    "fp16",
    "bf16",
)
OURS = {
    "data": (
        *("max_seq_length", "overlength", "skip_overlength", "eval_size", "layout"),
        *("mix", "format", "keys", "roles", "learn", "streaming", "shuffle_buffer", "chat_template_kwargs"),
    ),
    "model": ("dtype", "quantize"),
    "lora": ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_experts", "use_rslora", "use_dora"),
    "run": ("skip_nonfinite",),
}
_DAY, _WEIGHTS, _HELD_OUT = "template_date", "base_weights", "held_out"
_FILES = {
    "data": "the data file (SHA-256)",
    "evaluation": "the evaluation file (SHA-256)",
    _HELD_OUT: "the held-out records (SHA-256)",
    "base_config": "the base's config.json (SHA-256)",
    _WEIGHTS: "the base's weights (checksum)",
    "template": "the template (SHA-256)",
    "tokenizer": "the tokenizer (SHA-256)",
    "ranks": "processes",
}


def day_of(checkpoint: Path) -> date | None:
    """The date in the template of the run that wrote a checkpoint; None if the template prints none."""
    try:
        return date.fromisoformat(facts_in(checkpoint, "identity")[_DAY])
    except (ValueError, KeyError, TypeError):
        return None


def identity(run: RunContext, template: Template, data: Data) -> dict[str, Any]:
    """Names and values, converted to JSON types."""
    settings, args = run.settings, run.args
    values: dict[str, Any] = {
        "data": data.data_hash,
        "evaluation": data.eval_hash,
        _HELD_OUT: _held_out_hash(data.origins_held_out),
        "template": _sha(template.source),
        "tokenizer": _sha(tokenizer_text(template.tokenizer)),
        "ranks": args.world_size,
    }
    base_config = _config_of_base(str(settings.model.model_path))
    if base_config is not None:
        values["base_config"] = _sha(json.dumps(base_config, sort_keys=True))
    if args.process_index == 0:  # only this rank writes the manifest, so the others need not read the files
        values |= _weights_of_base(str(settings.model.model_path))
    if template.names_the_day:
        values[_DAY] = template.day.isoformat()
    for group, names in OURS.items():
        values |= {name: getattr(getattr(settings, group), name) for name in names}
    values |= {name: getattr(args, name) for name in TRAINER_SETTINGS if hasattr(args, name)}
    return dict(json.loads(json.dumps(values, default=str)))


def _config_of_base(path: str) -> dict[str, Any] | None:
    """The base's config.json; None if it cannot be read, which loading the model reports."""
    try:
        values = read_json_object(Path(cached_file(path, MODEL_CONFIG) or ""))
    except (OSError, ValueError):
        return None
    # Where it was saved, and by which version, changes no number.
    return {name: value for name, value in values.items() if name not in ("_name_or_path", "transformers_version")}


def _weights_of_base(path: str) -> dict[str, str]:
    """A checksum of every byte in the base's weight files; empty if they are not on this machine yet.

    The fingerprint covers only a few rows of each weight, since it must be equal in every dtype. This covers the rest.
    """
    folder = folder_of(path)
    files = weight_files(folder) if folder else []
    if not files:
        return {}
    try:
        with ThreadPoolExecutor(max_workers=4) as pool:
            checksums = list(pool.map(_crc32, files))
    except OSError:  # an unreadable file; loading the model reports it
        return {}
    return {_WEIGHTS: _sha(" ".join(f"{checksum:08x}" for checksum in checksums))}


def _crc32(file: Path) -> int:
    """CRC-32, which finds any accidental change; about 1 GB per second, three times as fast as SHA-256."""
    checksum = 0
    with file.open("rb") as opened:
        while chunk := opened.read(2**22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def refuse_another_run(run: RunContext, now: dict[str, Any]) -> None:
    """Raise BadSettings if a resumed run differs from the original one, naming each setting with both values.

    With --resume_anyway there is only a notice. A checkpoint of another tool has no identity to compare.
    """
    console, resumed = run.console, run.resumed
    if resumed is None:
        return
    checkpoint = resumed.checkpoint
    try:
        manifest = read_manifest(checkpoint)
    except (OSError, ValueError):
        console.notice(f"{checkpoint} has no manifest; so it cannot be checked whether this run made it.")
        return
    before = {**_held_out_before(checkpoint), **manifest.get("identity", {})}
    others = _other_versions(manifest.get("versions", {}), run.record.values["versions"])
    if others:
        console.notice(f"versions changed since the run began, so the last bits may differ: {others}.")
    _refuse_changes(run, checkpoint, before, now)


def with_downloaded_weights(run: RunContext, now: dict[str, Any]) -> dict[str, Any]:
    """The identity with the base's weights, if they were downloaded only when the model was loaded.

    Raises BadSettings if a resumed run began with other ones, as `refuse_another_run` does.
    """
    if _WEIGHTS in now or run.args.process_index != 0:
        return now
    weights = _weights_of_base(str(run.settings.model.model_path))
    if run.resumed is not None:
        before = facts_in(run.resumed.checkpoint, "identity")  # empty without a manifest, which has been said
        _refuse_changes(run, run.resumed.checkpoint, before, weights)
    return now | weights


def _refuse_changes(run: RunContext, checkpoint: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise BadSettings with all values that differ; with --resume_anyway give a notice instead."""
    changed = [
        f"{_name_of(name)}: {_shown(before[name])} in {checkpoint.name}, {_shown(value)} now"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    if not changed:
        return
    if run.settings.run.resume_anyway:
        run.console.notice(
            f"this is no longer the run that was started (--resume_anyway). Changed: {'; '.join(changed)}."
        )
        return
    raise BadSettings(
        [
            f"This is not the run that made {checkpoint.name}. What changed:",
            *changed,
            "Undo these changes; or pass --resume_anyway to continue with the new values; or start a new run from "
            f"these weights: --continue_training --checkpoint {adapter_file(checkpoint)} --output_dir NEW",
        ]
    )


def _held_out_before(checkpoint: Path) -> dict[str, str]:
    """The held-out records of a run whose manifests do not name them, from its run.json; empty if it has none."""
    record = read_record(checkpoint.parent)
    return {_HELD_OUT: _held_out_hash(record.get("records_held_out") or [])} if record else {}


def _held_out_hash(origins: Sequence[str]) -> str:
    """A hash of the records' places in their files, which may be renamed; "none" if there are none."""
    places = [origin.rpartition(":")[2] for origin in origins]
    return _sha(" ".join(places)) if places else "none"


def _other_versions(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {before[name]} → {now[name]}" for name in now if before.get(name, now[name]) != now[name])


def _name_of(name: str) -> str:
    return _FILES.get(name, f"--{name}")


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:  # a SHA-256
        return f"{value[:12]}…"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
