"""Run settings: what a training run is made of: its records, model, adapter and Trainer, and how it resumes and stops.

Other commands take some of these classes too (command_settings.py).
"""

import json
from collections.abc import Sequence
from datetime import date
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from atomtune.choices import (
    LARGEST_RANK,
    SHORTEST_RECORD,
    TEMPLATES,
    Dtype,
    FormatChoice,
    LayoutChoice,
    Learn,
    Overlength,
    Quantize,
)
from atomtune.settings.declare import (
    LARGEST_SEED,
    STRICT,
    keys_setting,
    roles_setting,
    seed_setting,
    setting,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RecordSettings:
    """Data"""

    dataset_path: str | list[str] | None = setting(
        None,
        "the records: one or more files (JSONL, JSON, CSV, TSV, Parquet, Arrow; also .gz and .zst), a folder saved by "
        "`datasets`, or the name of a dataset on the hub",
        value="FILE",
    )
    format: FormatChoice = setting(
        "auto", "format of the records; auto detects it from the first records of each file", rare=True
    )
    keys: list[str] = keys_setting()
    roles: list[str] = roles_setting()
    mix: list[float] = setting(
        [],
        "with several files: how many times per epoch each file's records are used, in the order of the files, for "
        "example 1 0.5",
        value="X",
        rare=True,
    )
    template: str = setting(
        "auto",
        "how a conversation becomes text: auto (the tokenizer's own chat template; without one, atom for a Chinese "
        f"vocabulary, else plain), a .jinja file, or one of {', '.join(TEMPLATES)}",
        value="FILE_OR_NAME",
    )
    chat_template_kwargs: str | None = setting(
        None,
        "variables of the template, as a JSON object: '{\"enable_thinking\": false}'; a record's own "
        "chat_template_kwargs take precedence",
        value="JSON",
        rare=True,
    )
    template_date: str | None = setting(
        None,
        "the date that a template writes, if it writes one, for example 2026-01-31; default: the day the run began",
        value="DATE",
        rare=True,
    )
    learn: Learn = setting(
        "all", "which answers of a conversation are learned: all of them, or only the last", rare=True
    )
    max_seq_length: int | None = setting(
        None,
        "maximum length of a record, in tokens; --overlength says what happens to longer ones; default: auto, the "
        "longest record, limited by the base and the memory",
        at_least=SHORTEST_RECORD,
        unit="tokens",
    )
    overlength: Overlength = setting(
        "shorten",
        "for a record that is too long: shorten its prompt, skip the record, or stop with an error; an answer is never "
        "cut",
    )
    skip_overlength: bool = setting(False, "the tutorial's name for --overlength skip", rare=True)
    skip_bad: bool = setting(
        False,
        "leave out records that cannot be used and train on the others; run.json lists them. Without it, one such "
        "record stops the run",
        rare=True,
    )
    layout: LayoutChoice = setting(
        "auto",
        "how the records of a batch are laid out: tree computes shared prefixes once, packed puts records end to end, "
        "padded pads them to the longest; auto takes the cheapest that gives the same result",
        rare=True,
    )

    @property
    def dataset_paths(self) -> list[str]:
        """The files, folders and hub names in dataset_path."""
        if self.dataset_path is None:
            return []
        return [self.dataset_path] if isinstance(self.dataset_path, str) else self.dataset_path

    def template_options(self) -> dict[str, Any]:
        """Arguments of load_template, besides the template's name."""
        return {
            "variables": json.loads(self.chat_template_kwargs) if self.chat_template_kwargs else {},
            "day": date.fromisoformat(self.template_date) if self.template_date else None,
        }

    @property
    def max_tokens(self) -> int:
        """max_seq_length, which must no longer be auto."""
        assert self.max_seq_length is not None
        return self.max_seq_length

    def rules(self) -> dict[str, Any]:
        """How records become examples, as plain values."""
        return {
            "max_tokens": self.max_tokens,
            "overlength": "skip" if self.skip_overlength else self.overlength,
            "learn": self.learn,
            "format": self.format,
            "keys": _pairs(self.keys),
            "roles": _pairs(self.roles),
        }


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSettings(RecordSettings):
    """Data"""

    eval_path: str | None = setting(
        None, "records to evaluate on; --format, --keys and --roles hold for them too", value="FILE"
    )
    eval_size: float | None = setting(
        None,
        "without --eval_path: how many records to hold out and evaluate on: a share (below 1) or a number, 0 for none; "
        "similar records stay on the same side; default: auto, one in ten if there are enough",
        at_least=0,
    )
    streaming: bool = setting(
        False, "encode records while training and keep nothing on disk; needs --max_steps", rare=True
    )
    shuffle_buffer: int = setting(
        10_000, "with --streaming: number of records to shuffle among", at_least=1, rare=True, unit="records"
    )

    @property
    def sources(self) -> list[str]:
        """Where the records to train on and to evaluate on are."""
        return [*self.dataset_paths, self.eval_path] if self.eval_path else self.dataset_paths


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenizerSettings:
    """Model"""

    model_path: str | None = setting(
        None, "the base model: a folder, or a name on the Hugging Face hub", value="FOLDER_OR_NAME"
    )
    trust_remote_code: bool = setting(
        False, "run Python code that comes with the model; read that code first", rare=True
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StoredBaseSettings(TokenizerSettings):
    """Model"""

    # The base as it is stored, which is what engines load.

    dtype: Dtype = setting(
        "auto",
        "number format of the base model's weights; auto: bfloat16 if the device is fast with it, else float32",
    )
    device_map: str | None = setting(
        None, "auto spreads a model that is too large for one device over all devices", value="auto", rare=True
    )

    def base(self) -> dict[str, Any]:
        """Arguments of model.load.BaseSpec, besides dtype, device and quantize."""
        return {
            "path": str(self.model_path),
            "device_map": self.device_map,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSettings(StoredBaseSettings):
    """Model"""

    quantize: Quantize | None = setting(
        None, "keep the base model in 4 bits (nf4) or 8 bits (int8) to save memory; needs atomtune[qlora]"
    )

    def base(self) -> dict[str, Any]:
        """Arguments of model.load.BaseSpec, besides dtype and device."""
        return {**StoredBaseSettings.base(self), "quantize": self.quantize}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraSettings:
    """LoRA"""

    lora_rank: int = setting(
        8,
        "rank of the adapter's two matrices: a higher rank can learn more and takes more memory",
        at_least=1,
        at_most=LARGEST_RANK,
    )
    lora_alpha: float = setting(
        # The same limit as for an adapter's file (model/file_schemas.py): an adapter with more could not be loaded
        # again.
        32.0,
        "the adapter's output is multiplied by alpha / rank",
        at_least=0,
        at_most=1_000_000,
    )
    lora_dropout: float = setting(
        0.1,
        "share of the adapter's input that is set to zero in training, against overfitting",
        at_least=0,
        below=1,
    )
    lora_targets: list[str] = setting(
        ["all-linear"],
        "which layers get an adapter, by name, for example q_proj v_proj; all-linear: every linear layer except the "
        "output layer; all-linear,lm_head: the output layer too",
        value="LAYER",
    )
    lora_experts: bool = setting(
        False,
        "adapt the experts of a mixture of experts too: they are most of its weights, and stay frozen otherwise",
        rare=True,
    )
    use_rslora: bool = setting(
        False,
        "rsLoRA: the adapter's output is multiplied by alpha / √rank, so that it does not shrink as the rank grows",
        rare=True,
    )
    use_dora: bool = setting(
        False,
        "DoRA: the length of each row of an adapted matrix is learned too; slower, and vLLM serves it only merged",
        rare=True,
    )

    def lora(self) -> dict[str, Any]:
        """Arguments of model.adapter.LoraSpec."""
        return {
            "rank": self.lora_rank,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "targets": tuple(self.lora_targets),
            "experts": self.lora_experts,
            "rslora": self.use_rslora,
            "dora": self.use_dora,
        }


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainerSettings:
    """Training"""

    # Names and meanings are those of transformers.TrainingArguments. Declared here are settings that users change, and
    # those with a range that the library does not check. All others pass through: settings/library.py.

    output_dir: str | None = setting(
        None, "folder for the adapter, its checkpoints and run.json; default: a new folder runs/NAME-1", value="FOLDER"
    )
    learning_rate: float | None = setting(
        None,
        "step size of the optimizer at its peak; LoRA tolerates much higher values than full fine-tuning; default: "
        "auto, from the width of the base and the number of steps",
        at_least=0,
    )
    lr_scheduler_type: str = setting("linear", "how the learning rate changes after the warm-up")
    warmup_steps: float = setting(
        0,
        "steps in which the learning rate rises from 0, or their share of all steps (below 1)",
        at_least=0,
        unit="steps",
    )
    num_train_epochs: float | None = setting(
        None,
        "how often every record is seen; default: auto, 3, or more if there are few records",
        more_than=0,
        at_most=1_000_000,
        unit="epochs",
    )
    max_steps: int = setting(
        -1,
        "how many optimizer steps to run, whatever --num_train_epochs says; -1: no limit",
        at_least=-1,
        unit="steps",
    )
    per_device_train_batch_size: int | None = setting(
        None,
        "records in a batch, on each device; default: auto, 16, or fewer if that would leave few steps",
        at_least=1,
        unit="records",
    )
    gradient_accumulation_steps: int = setting(
        1,
        "batches whose gradients are accumulated before a step; more saves memory: 4 batches of 4 make a step of 16",
        at_least=1,
        unit="batches",
    )
    logging_steps: float | None = setting(
        None,
        "steps between two lines of loss and speed; below 1, a share of all steps; default: auto, 50 lines or more",
        more_than=0,
        unit="steps",
        rare=True,
    )
    eval_strategy: str | None = setting(
        None,
        "when to evaluate; default: auto, before the first step and after each epoch (or ten times in a run of few or "
        "many epochs) if there are records to evaluate on",
        rare=True,
    )
    eval_steps: float | None = setting(
        None,
        "with --eval_strategy steps: steps between two evaluations [as --logging_steps]",
        more_than=0,
        unit="steps",
        rare=True,
    )
    save_strategy: str | None = setting(
        None,
        "when to save a checkpoint; default: auto, with each evaluation, else as --save_steps says",
        rare=True,
    )
    save_steps: float | None = setting(
        None,
        "steps between two checkpoints; below 1, a share of all steps; default: auto, 500, or fewer in a short run",
        more_than=0,
        unit="steps",
    )
    load_best_model_at_end: bool | None = setting(
        None,
        "end with the adapter of the checkpoint with the best evaluation, not of the last step; default: auto, if each "
        "checkpoint is evaluated",
        rare=True,
    )
    save_total_limit: int | None = setting(
        3,
        "how many checkpoints to keep; the oldest are removed",
        at_least=1,
        unit="checkpoints",
        rare=True,
    )
    seed: int = seed_setting("seed for shuffling, initial weights and dropout")
    data_seed: int | None = setting(
        None, "seed for shuffling only [as --seed]", at_least=0, at_most=LARGEST_SEED, rare=True
    )
    per_device_eval_batch_size: int = setting(
        8, "records in a batch of an evaluation, on each device", at_least=1, rare=True, unit="records"
    )
    eval_accumulation_steps: int | None = setting(
        None, "batches of an evaluation whose results stay on the device", at_least=1, rare=True, unit="batches"
    )
    eval_delay: float = setting(0, "steps or epochs before the first evaluation", at_least=0, rare=True)
    weight_decay: float = setting(
        0.0,
        "weight decay: each step shrinks the weights by this times the learning rate",
        at_least=0,
        at_most=1_000,
        rare=True,
    )
    max_grad_norm: float = setting(
        1.0, "gradients with a larger norm are scaled down to this one; 0: never", at_least=0, rare=True
    )
    label_smoothing_factor: float = setting(
        0.0, "share of probability that the target leaves to all other tokens", at_least=0, below=1, rare=True
    )
    adam_beta1: float = setting(0.9, "Adam: how much of the mean gradient a step keeps", at_least=0, below=1, rare=True)
    adam_beta2: float = setting(
        0.999, "Adam: how much of the mean squared gradient a step keeps", at_least=0, below=1, rare=True
    )
    adam_epsilon: float = setting(1e-8, "Adam: added to the divisor against division by zero", more_than=0, rare=True)
    neftune_noise_alpha: float | None = setting(
        None,
        "noise on the embeddings in training; the paper uses 5 to 15; each row then holds one record",
        at_least=0,
        at_most=1e6,
        rare=True,
    )
    dataloader_num_workers: int = setting(
        0, "processes that prepare batches ahead", at_least=0, rare=True, unit="processes"
    )
    dataloader_prefetch_factor: int | None = setting(
        None, "batches that each of these processes prepares ahead", at_least=1, rare=True, unit="batches"
    )
    torch_empty_cache_steps: int | None = setting(
        None, "steps between two clearings of the device's memory cache", at_least=1, rare=True, unit="steps"
    )
    ddp_timeout: int = setting(
        1800,
        "how many seconds one process of a job waits for the others",
        at_least=1,
        at_most=1_000_000_000,
        rare=True,
        unit="seconds",
    )


#: Settings of TrainerSettings whose default is not the library's.
CHANGED_DEFAULTS = ("save_total_limit",)  # as in the tutorial
#: Settings that may be `auto`: the run then chooses what suits its records and its base (train/defaults.py).
AUTOMATIC = (
    *("max_seq_length", "eval_size", "learning_rate", "num_train_epochs", "per_device_train_batch_size"),
    *("logging_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps", "load_best_model_at_end"),
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunSettings:
    """Run"""

    resume: bool = setting(
        False,
        "resume from the newest complete checkpoint in --output_dir; start from the beginning if there is none. "
        "Without --model_path and --dataset_path, the settings of that run are taken from its run.json",
    )
    resume_from_checkpoint: str | None = setting(None, "resume from this checkpoint", value="FOLDER", rare=True)
    continue_training: bool = setting(False, "the tutorial's way to resume; needs --checkpoint", rare=True)
    checkpoint: str | None = setting(
        None,
        "with --continue_training: a checkpoint to resume from, or an adapter's weights to start from",
        value="FOLDER_OR_FILE",
        rare=True,
    )
    resume_anyway: bool = setting(
        False,
        "resume even though data or settings have changed since the run began, or its best checkpoint is gone",
        rare=True,
    )
    early_stopping_patience: int = setting(
        0,
        "stop after this many evaluations in a row without a lower held-out loss; 0: never",
        at_least=0,
        unit="evaluations",
        rare=True,
    )
    max_minutes: float = setting(
        0.0,
        "save a checkpoint and stop with exit code 75 after this many minutes; 0: no limit",
        at_least=0,
        rare=True,
        unit="minutes",
    )
    skip_nonfinite: int = setting(
        0,
        "skip up to this many steps whose loss or gradient is not finite; 0: the first one ends the run",
        at_least=0,
        rare=True,
        unit="steps",
    )
    gradient_checkpointing: Literal["auto", "true", "false"] = setting(
        "auto",
        "save memory by computing activations twice, which is slower; auto: in as many layers as memory requires",
    )
    cuda_graphs: bool = setting(
        True, "on a GPU, record the kernels of small steps and replay them, if the model allows it", rare=True
    )
    verify: bool = setting(
        False,
        "before training, compare this layout with plain transformers + PEFT, as `atomtune verify` does",
        rare=True,
    )


def _pairs(words: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Words of the form `theirs=ours` as pairs."""
    pairs = []
    for word in words:
        theirs, equals, ours = word.rpartition("=")  # their name may hold another "="
        pairs.append((theirs, ours) if equals else (word, ""))
    return tuple(pairs)
