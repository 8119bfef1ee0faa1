"""Settings: every one exists once, here, as flag, YAML key, help line, default and check.

After: settings/read.py fills them from flags and YAML.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from atomtune.choices import CHECKS, TEMPLATES, Dtype, FormatChoice, LayoutChoice, Learn, Overlength, Quantize

STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


def setting(default: Any, text: str, *, at_least: float | None = None, below: float | None = None) -> Any:
    """A field of a settings class: its default, its help line (with the unit) and its range."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return Field(description=text, ge=at_least, lt=below, **factory)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RecordSettings:
    """Data"""

    dataset_path: str | list[str] | None = setting(
        None, "records: files (JSONL, JSON, CSV, TSV, Parquet, also .gz and .zst), a `datasets` folder or a hub name"
    )
    mix: list[float] = setting([], "with several files: how often each one's records are seen in an epoch, as 1 0.5")
    format: FormatChoice = setting("auto", "how a record is written; auto: told from each file's first records")
    keys: list[str] = setting([], "other names of keys, as question=instruction,answer=output")
    roles: list[str] = setting([], "other names of roles, as bot=assistant")
    learn: Learn = setting("all", "of a conversation: every answer, or the last one alone")
    max_seq_length: int = setting(256, "longest example, in tokens", at_least=8)
    overlength: Overlength = setting(
        "shorten", "what to do with a longer one: shorten its prompt, skip it, or stop; the answer is never cut"
    )
    skip_overlength: bool = setting(False, "the tutorial's name for --overlength skip")
    skip_bad: bool = setting(False, "train on the good records when some are broken; the broken are listed in run.json")
    template: str = setting(
        "auto",
        f"auto (the tokenizer's own chat template, else atom), a .jinja file, or one of {', '.join(TEMPLATES)}",
    )
    layout: LayoutChoice = setting(
        "auto", "how a batch is laid out: shared beginnings once, end to end, or padded; auto: the cheapest exact one"
    )

    @property
    def dataset_paths(self) -> list[str]:
        """The files, folders and hub names in dataset_path."""
        if self.dataset_path is None:
            return []
        return [self.dataset_path] if isinstance(self.dataset_path, str) else self.dataset_path

    def rules(self) -> dict[str, Any]:
        """How values become examples, as plain values."""
        return {
            "max_tokens": self.max_seq_length,
            "overlength": "skip" if self.skip_overlength else self.overlength,
            "learn": self.learn,
            "format": self.format,
            "keys": _pairs(self.keys),
            "roles": _pairs(self.roles),
        }


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSettings(RecordSettings):
    """Data"""

    eval_path: str | None = setting(None, "records to evaluate on, in the same form")
    eval_size: float = setting(
        0.0,
        "without --eval_path: hold out this share (below 1) or this many records; what is alike stays on one side",
        at_least=0,
    )
    streaming: bool = setting(False, "encode while training and store nothing; needs --max_steps")
    shuffle_buffer: int = setting(10_000, "with --streaming: records that wait to be drawn from", at_least=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenizerSettings:
    """The base whose tokenizer reads the records"""

    model_path: str | None = setting(None, "the base model: a folder or a name on the hub")
    trust_remote_code: bool = setting(False, "run Python code that comes with the model; read it first")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSettings(TokenizerSettings):
    """Model"""

    dtype: Dtype = setting(
        "auto", "number format of the base's weights; auto: bfloat16 where the device is good at it, else float32"
    )
    quantize: Quantize | None = setting(None, "keep the base in 4 or 8 bits (needs atomtune[qlora])")
    device_map: str | None = setting(None, "auto spreads a base larger than one device over all there are")

    def base(self) -> dict[str, Any]:
        """What model.load.BaseSpec needs to know, besides dtype and device."""
        return {
            "path": str(self.model_path),
            "device_map": self.device_map,
            "quantize": self.quantize,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraSettings:
    """LoRA"""

    lora_rank: int = setting(8, "width of the adapter", at_least=1)
    lora_alpha: float = setting(32.0, "the adapter's output is scaled by alpha / rank", at_least=0)
    lora_dropout: float = setting(0.1, "share of the adapter's input dropped while training", at_least=0, below=1)
    lora_targets: list[str] = setting(["all-linear"], "layer names, or all-linear")

    def lora(self) -> dict[str, Any]:
        """What model.adapter.LoraSpec needs to know."""
        return {
            "rank": self.lora_rank,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "targets": tuple(self.lora_targets),
        }


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunSettings:
    """Run"""

    resume: bool = setting(False, "go on from the newest whole checkpoint in --output_dir; from the start if none")
    resume_from_checkpoint: str | None = setting(None, "go on from this checkpoint folder")
    continue_training: bool = setting(False, "the tutorial's way to go on; needs --checkpoint")
    checkpoint: str | None = setting(None, "with --continue_training: a checkpoint, or adapter weights to start from")
    resume_anyway: bool = setting(False, "go on although data or settings are not those that the run began with")
    max_minutes: float = setting(
        0.0, "stop after so many minutes with a checkpoint, exit code 75; 0: no limit", at_least=0
    )
    skip_nonfinite: int = setting(
        0,
        "leave out up to so many steps whose loss or gradient is not finite; 0: the first one ends the run",
        at_least=0,
    )
    gradient_checkpointing: Literal["auto", "true", "false"] = setting(
        "auto", "recompute activations instead of keeping them; auto: when memory is short"
    )
    verify: bool = setting(
        False, "first check this layout against plain transformers + PEFT, as `atomtune verify` does"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VerifySettings(RecordSettings, ModelSettings, LoraSettings):
    """Verify"""

    records: int = setting(32, "how many records, drawn at random", at_least=1)
    per_device_train_batch_size: int = setting(16, "records in a batch, as the run will have them", at_least=1)
    seed: int = setting(42, "of the draw", at_least=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InspectSettings(RecordSettings, TokenizerSettings):
    """Inspect"""

    html: str | None = setting(None, "write the report as one page to this file")
    json: bool = setting(False, "print the ledger of records and tokens as JSON, and nothing else, on standard output")
    fail_on: list[str] = setting(
        [],
        "end with exit code 4 where more is found than allowed, as cut,duplicates=5%,control=10; "
        f"of {', '.join(CHECKS)}",
    )
    samples: int = setting(3, "how many records to show token by token", at_least=0)
    per_device_train_batch_size: int = setting(16, "records in a batch, to tell what a layout saves", at_least=1)
    seed: int = setting(42, "of the draw", at_least=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MergeSettings(TokenizerSettings):
    """Merge"""

    adapter_path: str = setting(..., "a run's output folder or one of its checkpoints")
    output_dir: str = setting(..., "where the merged model goes")
    other_base: bool = setting(False, "use a base whose weights are not those the adapter was trained on")
    dtype: Dtype = setting("auto", "number format of the merged weights; auto: as the base is stored")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChatSettings(ModelSettings):
    """Chat"""

    adapter_path: str = setting(..., "a run's output folder, one of its checkpoints, or a merged model")
    prompt: str | None = setting(None, "answer this and end; without it, a conversation")
    system: str | None = setting(None, "the instruction of the conversation")
    max_new_tokens: int = setting(512, "longest answer, in tokens", at_least=1)
    temperature: float = setting(0.0, "0: always the likeliest token; higher: more varied", at_least=0)
    other_base: bool = setting(False, "use a base whose weights are not those the adapter was trained on")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything `atomtune train` was told: its own groups, the Trainer's values, and where each was set."""

    data: DataSettings
    model: ModelSettings
    lora: LoraSettings
    run: RunSettings
    trainer: dict[str, Any]
    origins: dict[str, str]  # setting → `--lora_rank`, `run.yaml:3`, `atomtune's default`
    demo: bool

    def resolved(self) -> dict[str, dict[str, Any]]:
        """Each setting of our own and each that the Trainer gets, with its origin."""
        values = {
            f.name: getattr(group, f.name)
            for group in (self.data, self.model, self.lora, self.run)
            for f in fields(group)
        } | self.trainer
        return {
            name: {
                "value": "(not kept)" if _secret(name) and value else value,
                "source": self.origins.get(name, "default"),
            }
            for name, value in values.items()
        }


def _secret(name: str) -> bool:
    return name.endswith(("_token", "_key", "_secret", "_password"))


def _pairs(words: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`theirs=ours` words as pairs."""
    return tuple((theirs, ours) for theirs, _, ours in (word.partition("=") for word in words))
