"""Settings: each setting of a command is declared once, here: flag, YAML key, help line, default and range.

A setting with the same meaning in several commands is made by one function. Where a name means different things, for
example `json` or `adapter_path`, each class declares it. A class's docstring is the heading over its settings in
`--help`.
"""

import json
from collections.abc import Sequence
from datetime import date
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from atomtune.choices import (
    CHECKS,
    LARGEST_RANK,
    SHORTEST_RECORD,
    TEMPLATES,
    Dtype,
    EngineName,
    ExportTarget,
    FormatChoice,
    GgufFormat,
    LayoutChoice,
    Learn,
    Overlength,
    Quantize,
    ServeEngine,
)

STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)

#: In tokens; no model has more positions.
LONGEST_ANSWER = 10_000_000
#: The largest seed of numpy's generators.
LARGEST_SEED = 2**32 - 1


def setting(
    default: Any,
    text: str,
    *,
    value: str | None = None,
    unit: str | None = None,
    rare: bool = False,
    at_least: float | None = None,
    more_than: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a field of a settings class.

    text: the help line: what it does, and in which unit.
    value: the placeholder in --help, for example FILE or N.
    unit: of a number, for programs; the help line has it in words.
    rare: shown only by `--help all`.
    """
    is_list = isinstance(default, list)
    return Field(
        **{"default_factory": lambda: list(default)} if is_list else {"default": default},
        description=text,
        ge=at_least,
        gt=more_than,
        le=at_most,
        lt=below,
        json_schema_extra={"value": value, "unit": unit, "rare": rare},
    )


def other_base_setting(*, rare: bool = False) -> Any:
    """Accept a base with other weights than the adapter was trained on, for all commands that load an adapter."""
    text = "accept a base model whose weights are not those that the adapter was trained on"
    return setting(False, text, rare=rare)


def seed_setting(text: str, *, default: int = 42, rare: bool = False) -> Any:
    """A seed, for what the text says."""
    return setting(default, text, at_least=0, at_most=LARGEST_SEED, rare=rare)


def answer_setting(default: int, text: str) -> Any:
    """The longest answer, in tokens."""
    return setting(default, text, at_least=1, at_most=LONGEST_ANSWER, unit="tokens")


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
    keys: list[str] = setting(
        [],
        "rename keys of your records, for example question=instruction answer=output",
        value="THEIRS=OURS",
        rare=True,
    )
    roles: list[str] = setting(
        [], "rename roles of your conversations, for example bot=assistant", value="THEIRS=OURS", rare=True
    )
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
        None, "records to evaluate on, in the same format as those to train on", value="FILE"
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
class ModelSettings(TokenizerSettings):
    """Model"""

    dtype: Dtype = setting(
        "auto",
        "number format of the base model's weights; auto: bfloat16 if the device is fast with it, else float32",
    )
    quantize: Quantize | None = setting(
        None, "keep the base model in 4 bits (nf4) or 8 bits (int8) to save memory; needs atomtune[qlora]"
    )
    device_map: str | None = setting(
        None, "auto spreads a model that is too large for one device over all devices", value="auto", rare=True
    )

    def base(self) -> dict[str, Any]:
        """Arguments of model.load.BaseSpec, besides dtype and device."""
        return {
            "path": str(self.model_path),
            "device_map": self.device_map,
            "quantize": self.quantize,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainedModelSettings(ModelSettings):
    """Model"""

    quantize: Quantize | None = setting(
        None,
        "keep the base model in 4 bits (nf4) or 8 bits (int8) to save memory; default: as in training; needs "
        "atomtune[qlora]",
    )
    stored_base: bool = setting(
        False,
        "for an adapter that was trained on a quantized base: use the base's weights as they are stored, not as "
        "training rounded them",
        rare=True,
    )


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VerifySettings(RecordSettings, ModelSettings, LoraSettings):
    """Verify"""

    records: int = setting(32, "how many records to compare, chosen at random", at_least=1, unit="records")
    per_device_train_batch_size: int = setting(
        16, "records in a batch, as the run will have them", at_least=1, unit="records"
    )
    seed: int = seed_setting("seed for choosing the records")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InspectSettings(RecordSettings, TokenizerSettings):
    """Inspect"""

    html: str | None = setting(None, "write the report to this file, as one web page", value="FILE")
    json: bool = setting(
        False, "print the counts of records and tokens as JSON on standard output, and nothing else there"
    )
    fail_on: list[str] = setting(
        [],
        "end with exit code 4 if a check finds more than allowed, for example cut duplicates=5% control=10; checks: "
        f"{', '.join(CHECKS)}",
        value="CHECK",
    )
    samples: int = setting(3, "how many records to show token by token", at_least=0, unit="records")
    per_device_train_batch_size: int = setting(
        16, "records in a batch, to estimate what sharing saves", at_least=1, rare=True, unit="records"
    )
    seed: int = seed_setting("seed for choosing the records to show", rare=True)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MergeSettings(TokenizerSettings):
    """Merge"""

    adapter_path: str | list[str] = setting(
        ...,
        "the output folder of a run, or one of its checkpoints; several are summed as --weights says",
        value="FOLDER",
    )
    weights: list[float] = setting(
        [],
        "with several adapters: how much of each, for example 0.7 0.3; 0.5 0.5 is the mean of two, 1 1 their sum",
        value="X",
    )
    stored_base: bool = setting(
        False,
        "for an adapter that was trained on a quantized base: merge into the base's weights as they are stored, not as "
        "training rounded them",
        rare=True,
    )
    output_dir: str = setting(..., "folder for the merged model", value="FOLDER")
    other_base: bool = other_base_setting(rare=True)
    dtype: Dtype = setting("auto", "number format of the merged weights; auto: as the base model is stored")

    @property
    def adapter_paths(self) -> list[str]:
        return [self.adapter_path] if isinstance(self.adapter_path, str) else self.adapter_path


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoadSettings(TrainedModelSettings):
    """Model"""

    adapter_path: str = setting(
        ..., "the output folder of a run, one of its checkpoints, or a merged model", value="FOLDER"
    )
    system: str | None = setting(None, "instruction that a conversation starts with", value="TEXT")
    other_base: bool = other_base_setting(rare=True)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChatSettings(LoadSettings):
    """Chat"""

    prompt: str | None = setting(None, "answer this and exit; without it, a conversation starts", value="TEXT")
    compare: bool = setting(False, "also show the base's answer, with the adapter switched off")
    max_new_tokens: int = answer_setting(512, "longest answer, in tokens")
    temperature: float = setting(
        0.0, "0 always takes the most likely token; the higher, the more varied the answers", at_least=0
    )
    top_p: float | None = setting(
        None,
        "with --temperature: sample from the likeliest tokens that together have this probability [the base's own]",
        more_than=0,
        at_most=1,
    )
    top_k: int | None = setting(
        None, "with --temperature: sample from this many of the likeliest tokens; 0: all [the base's own]", at_least=0
    )
    repetition_penalty: float | None = setting(
        None,
        "above 1: tokens that were already used become less likely [the base's own]",
        at_least=0.1,
        at_most=10,
    )
    seed: int = seed_setting("seed of the first sampled answer; each later answer uses the next seed", default=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WebSettings(LoadSettings):
    """Web"""

    max_new_tokens: int = answer_setting(512, "longest answer, in tokens; the page can change it")
    host: str = setting(
        "127.0.0.1", "address to listen on; anything but this machine's own needs --password", value="ADDRESS"
    )
    port: int = setting(7860, "port to listen on", at_least=1, at_most=65535)
    password: str | None = setting(
        None,
        "password that visitors must enter, with the user name atomtune [the environment variable ATOMTUNE_PASSWORD]",
        value="TEXT",
    )
    open: bool = setting(False, "open the page in this machine's browser")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateSettings(TrainedModelSettings):
    """Evaluate"""

    adapter_path: list[str] = setting(
        [], "one or more adapters: a run's output folder or one of its checkpoints", value="FOLDER"
    )
    dataset_path: str | list[str] | None = setting(
        None, "records to evaluate on; without it, those that the first adapter's run held out", value="FILE"
    )
    format: FormatChoice = setting("auto", "format of the records; auto detects it from the first records of each file")
    keys: list[str] = setting(
        [],
        "rename keys of your records, for example question=instruction answer=output",
        value="THEIRS=OURS",
        rare=True,
    )
    roles: list[str] = setting(
        [], "rename roles of your conversations, for example bot=assistant", value="THEIRS=OURS", rare=True
    )
    template: str = setting("auto", "chat template of a base without an adapter; an adapter brings its own", rare=True)
    chat_template_kwargs: str | None = setting(
        None, "variables of that template, as a JSON object; an adapter brings its own", value="JSON", rare=True
    )
    max_seq_length: int = setting(
        0,
        "longest example, in tokens; 0: as the adapter was trained, or 2,048 if that is not known, less on a smaller "
        "base",
        at_least=0,
        unit="tokens",
    )
    records: int = setting(200, "how many records at most, chosen at random; 0: all", at_least=0, unit="records")
    per_device_eval_batch_size: int = setting(8, "records in a batch", at_least=1, unit="records")
    max_new_tokens: int = answer_setting(256, "longest generated answer, in tokens")
    no_generate: bool = setting(False, "compute only the likelihood of the reference answers; much faster")
    no_probe: bool = setting(False, "skip the forgetting probe")
    lm_eval_tasks: list[str] = setting(
        [],
        "also benchmarks of lm-evaluation-harness, for example arc_easy,hellaswag; a .yaml file of your own task, or a "
        "folder of such files",
        value="TASK",
    )
    lm_eval_limit: int = setting(0, "questions of each of these tasks; 0: all", at_least=0, unit="questions")
    output_dir: str | None = setting(
        None,
        "where the reports go; without it, evaluation/ in the first adapter's folder, evaluation-1/ beside the report "
        "of another evaluation",
        value="FOLDER",
    )
    other_base: bool = other_base_setting()
    seed: int = seed_setting("seed for the choice of records and for the intervals")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CertifySettings(ModelSettings):
    """Certify"""

    adapter_path: str = setting(..., "the trained adapter: a run's output folder or a checkpoint", value="FOLDER")
    served: str | None = setting(
        None, "what the engine serves, if not the adapter: a merged folder or a .gguf", value="FOLDER_OR_FILE"
    )
    engine: list[EngineName] = setting(
        [], "engines to start; without it, llama.cpp for a .gguf and transformers for a folder"
    )
    prompts: int = setting(10, "how many prompts are sent, of several kinds", at_least=1, unit="prompts")
    max_new_tokens: int = answer_setting(32, "longest greedy answer that is compared, in tokens")
    other_base: bool = other_base_setting()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServeSettings(ModelSettings):
    """Serve"""

    adapter_path: list[str] = setting(
        ...,
        "the trained adapter: a run's output folder or a checkpoint; several, for vllm: requests choose by folder name",
        value="FOLDER",
    )
    served: str | None = setting(
        None, "what the engine serves, if not the adapter: a merged folder or a .gguf", value="FOLDER_OR_FILE"
    )
    engine: ServeEngine = setting(
        "auto",
        "the program that serves; auto: vllm on a GPU if it is installed, llama.cpp for a .gguf, else transformers",
    )
    host: str = setting(
        "127.0.0.1", "address to listen on; anything but this machine's own needs --api_key", value="ADDRESS"
    )
    port: int = setting(8000, "port to listen on", at_least=1, at_most=65535)
    api_key: str | None = setting(
        None,
        "refuse requests without this key [the environment variable ATOMTUNE_API_KEY]; works with vllm and llama.cpp",
        value="KEY",
    )
    context: int = setting(0, "longest conversation, in tokens; 0: as the engine chooses", at_least=0, unit="tokens")
    no_certify: bool = setting(False, "do not check first that the engine serves the tuned model")
    prompts: int = setting(10, "how many prompts are sent to check it", at_least=1, rare=True, unit="prompts")
    other_base: bool = other_base_setting(rare=True)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExportSettings(TokenizerSettings):
    """Export"""

    adapter_path: str = setting(..., "the output folder of a run, or one of its checkpoints", value="FOLDER")
    output_dir: str = setting(..., "folder for what is written", value="FOLDER")
    to: ExportTarget = setting("gguf", "gguf: for llama.cpp and Ollama; peft: the adapter for another model class")
    quantize: GgufFormat = setting("bf16", "number format of the GGUF")
    for_class: str | None = setting(None, "with --to peft: the transformers class that is to load it", value="CLASS")
    no_certify: bool = setting(False, "do not start the engine to check that it serves the tuned model")
    prompts: int = setting(10, "how many prompts are sent to check it", at_least=1, rare=True, unit="prompts")
    other_base: bool = other_base_setting(rare=True)


def base_of_adapter(settings: CertifySettings | ExportSettings | MergeSettings) -> dict[str, Any]:
    """What model.base_as_trained.adapter_and_base needs to know of the base that the user chose."""
    return {
        "model_path": settings.model_path,
        "trust_remote_code": settings.trust_remote_code,
        "other_base": settings.other_base,
    }


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunsSettings:
    """Runs"""

    folder: list[str] = setting(["."], "a folder with runs in it; two or more runs are compared", value="FOLDER")
    plot: str | None = setting(
        None,
        "draw the losses of the compared runs, of training and of held-out records, into this file",
        value="FILE.png",
    )
    json: bool = setting(False, "print the result as JSON")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainOutput:
    """Output"""

    json: bool = setting(False, "print run.json on standard output when the run is done, and nothing else there")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlanOutput:
    """Plan"""

    json: bool = setting(False, "print the figures as JSON")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SweepChoices:
    """Sweep"""

    try_: list[str] = setting(
        [],
        "values of a setting to try, for example learning_rate=1e-4,3e-4. With several of these, every combination is "
        "tried. With --trials also a range, for example learning_rate=1e-5:1e-3. Default: the learning rate that suits "
        "the base, a third of it and three times as much",
        value="NAME=A,B",
    )
    trials: int = setting(
        0,
        "run this many trials, each chosen from the results of the earlier ones, and stop those that are clearly "
        "behind; needs atomtune[sweep]; 0: every combination of --try once",
        at_least=0,
        unit="trials",
    )
    json: bool = setting(False, "print sweep.json on standard output, and nothing else there")


def is_secret(name: str) -> bool:
    """Whether a setting's value must never be written to a file or printed."""
    return name.endswith(("_token", "_key", "_secret", "_password"))


def _pairs(words: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Words of the form `theirs=ours` as pairs."""
    pairs = []
    for word in words:
        theirs, equals, ours = word.rpartition("=")  # their name may hold another "="
        pairs.append((theirs, ours) if equals else (word, ""))
    return tuple(pairs)
