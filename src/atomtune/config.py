"""Settings: every one exists once, here, as flag, YAML key, help line, default and check.

Before: sources.py, what flags and YAML say.  After: cli.py hands the settings to a command.
default < YAML < flag, and where each value came from is remembered. All problems are reported at once, before data or
model is touched. transformers.TrainingArguments' own settings pass under their own names.
"""

import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from atomtune.errors import BadSettings
from atomtune.sources import Given, given_values, kinds_of, library_kinds, yaml_values

STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
S = TypeVar("S")


def setting(default: Any, text: str, *, at_least: float | None = None, below: float | None = None) -> Any:
    """A field of a settings class: its default, its help line (with the unit) and its range."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return Field(description=text, ge=at_least, lt=below, **factory)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RecordSettings:
    """Data"""

    dataset_path: str | None = setting(
        None, "training records: a .jsonl (or .json array) of instruction, input, output"
    )
    max_seq_length: int = setting(256, "longest example, in tokens", at_least=8)
    overlength: Literal["shorten", "skip", "error"] = setting(
        "shorten", "what to do with a longer one: shorten its prompt, skip it, or stop; the answer is never cut"
    )
    skip_overlength: bool = setting(False, "the tutorial's name for --overlength skip")
    skip_bad: bool = setting(False, "train on the good records when some are broken; the broken are listed in run.json")
    template: str = setting("auto", "auto (the tokenizer's own chat template, else atom), atom, or a .jinja file")
    layout: Literal["auto", "tree", "packed", "padded"] = setting(
        "auto", "how a batch is laid out: shared beginnings once, end to end, or padded; auto: the cheapest exact one"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSettings(RecordSettings):
    """Data"""

    eval_path: str | None = setting(None, "records to evaluate on, in the same form")
    eval_size: float = setting(
        0.0, "without --eval_path: hold out this share (below 1) or this many records", at_least=0
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSettings:
    """Model"""

    model_path: str | None = setting(None, "the base: a folder or a hub name")
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = setting(
        "auto", "of the base's weights; auto: bfloat16 where the device is good at it, else float32"
    )
    quantize: Literal["nf4", "int8"] | None = setting(None, "keep the base in 4 or 8 bits (needs atomtune[qlora])")
    device_map: str | None = setting(None, "auto spreads a base larger than one device over all there are")
    trust_remote_code: bool = setting(False, "run Python code that comes with the model; read it first")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraSettings:
    """LoRA"""

    lora_rank: int = setting(8, "width of the adapter", at_least=1)
    lora_alpha: float = setting(32.0, "the adapter's output is scaled by alpha / rank", at_least=0)
    lora_dropout: float = setting(0.1, "share of the adapter's input dropped while training", at_least=0, below=1)
    lora_targets: list[str] = setting(["all-linear"], "layer names, or all-linear")


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
class MergeSettings:
    """Merge"""

    adapter_path: str = setting(..., "a run's output folder or one of its checkpoints")
    output_dir: str = setting(..., "where the merged model goes")
    model_path: str | None = setting(None, "the base, where it is not the one the adapter names")
    other_base: bool = setting(False, "use a base whose weights are not those the adapter was trained on")
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = setting("auto", "auto: as the base is stored")
    trust_remote_code: bool = setting(False, "run Python code that comes with the model; read it first")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChatSettings:
    """Chat"""

    adapter_path: str = setting(..., "a run's output folder, one of its checkpoints, or a merged model")
    prompt: str | None = setting(None, "answer this and end; without it, a conversation")
    system: str | None = setting(None, "the instruction of the conversation")
    max_new_tokens: int = setting(512, "longest answer, in tokens", at_least=1)
    temperature: float = setting(0.0, "0: always the likeliest token; higher: more varied", at_least=0)
    model_path: str | None = setting(None, "the base, where it is not the one the adapter names")
    other_base: bool = setting(False, "use a base whose weights are not those the adapter was trained on")
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = setting("auto", "of the base's weights")
    quantize: Literal["nf4", "int8"] | None = setting(None, "keep the base in 4 or 8 bits (needs atomtune[qlora])")
    device_map: str | None = setting(None, "auto spreads a base larger than one device over all there are")
    trust_remote_code: bool = setting(False, "run Python code that comes with the model; read it first")


#: TrainingArguments whose defaults are set for LoRA on a small data set, and why.
LIBRARY_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-4,  # the tutorial's; transformers' 5e-5 is for full fine-tuning
    "per_device_train_batch_size": 16,  # the tutorial's
    "logging_steps": 10,  # the tutorial's
    "save_total_limit": 3,  # the tutorial's
    "report_to": "none",
}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything `atomtune train` was told: its own groups, the Trainer's values, and the source of each."""

    data: DataSettings
    model: ModelSettings
    lora: LoraSettings
    run: RunSettings
    trainer: dict[str, Any]
    sources: dict[str, str]
    demo: bool

    def resolved(self) -> dict[str, dict[str, Any]]:
        """Each setting of our own and each the Trainer was given, with its source."""
        values = {
            f.name: getattr(group, f.name)
            for group in (self.data, self.model, self.lora, self.run)
            for f in fields(group)
        } | self.trainer
        return {
            name: {
                "value": "(not kept)" if _secret(name) and value else value,
                "source": self.sources.get(name, "default"),
            }
            for name, value in values.items()
        }


def _secret(name: str) -> bool:
    return name.endswith(("_token", "_key", "_secret", "_password"))


TRAIN_GROUPS = (DataSettings, ModelSettings, LoraSettings, RunSettings)
DEMO_FOLDER = Path(__file__).parent / "demo"


def read_train(argv: Sequence[str]) -> TrainSettings:
    """Settings of `atomtune train [run.yaml] --flag value …`. Raises BadSettings with every problem."""
    kinds = {**library_kinds(), **kinds_of(TRAIN_GROUPS)}
    given, problems = given_values(argv, kinds, TRAIN_GROUPS, command="train")
    demo = not (given.keys() & {"dataset_path", "model_path"})
    if demo and (DEMO_FOLDER / "demo.yaml").is_file():
        given = {**_demo_values(kinds, problems), **given}
    for one, other in (("dataset_path", "model_path"), ("model_path", "dataset_path")):
        if one in given and other not in given:
            problems.append(f"--{one} is given without --{other}. Pass both, or neither for the embedded demo.")
    groups: list[Any] = [_validated(group, given, problems) for group in TRAIN_GROUPS]
    trainer = dict(LIBRARY_DEFAULTS)
    for name in given.keys() - kinds_of(TRAIN_GROUPS).keys():
        trainer[name] = _checked(name, given[name], kinds[name], problems)
    settled = {name: value for group in groups if group for name, value in vars(group).items()} | trainer
    problems += _contradictions(settled, given)
    if problems:
        raise BadSettings(problems)
    sources = dict.fromkeys(LIBRARY_DEFAULTS, "atomtune's default") | {n: g.source for n, g in given.items()}
    data, model, lora, run = groups
    return TrainSettings(data=data, model=model, lora=lora, run=run, trainer=trainer, sources=sources, demo=demo)


def read_settings(group: type[S], argv: Sequence[str], *, command: str) -> S:
    """Settings of a command with one group and no Trainer."""
    given, problems = given_values(argv, kinds_of((group,)), (group,), command=command)
    settings = _validated(group, given, problems)
    if problems:
        raise BadSettings(problems)
    assert settings is not None
    return settings


def _contradictions(settled: Mapping[str, Any], given: Mapping[str, Given]) -> Iterator[str]:
    def on(name: str) -> bool:
        return bool(settled.get(name))

    if on("skip_overlength") and "overlength" in given and settled.get("overlength") != "skip":
        yield f"--skip_overlength and --overlength {settled.get('overlength')} contradict each other. Pass one of them."
    if on("continue_training") and not on("checkpoint"):
        yield "--continue_training needs --checkpoint with the folder to go on from. --resume finds the newest itself."
    if on("checkpoint") and not on("continue_training"):
        yield "--checkpoint is only read with --continue_training. Add it, or use --resume_from_checkpoint."
    ways = [f"--{name}" for name in ("resume", "resume_from_checkpoint", "continue_training") if on(name)]
    if len(ways) > 1:
        yield f"{' and '.join(ways)} each name a place to go on from. Pass one of them."
    if on("eval_path") and on("eval_size"):
        yield "--eval_path and --eval_size each choose the evaluation records. Pass one of them."
    if on("fp16") and on("bf16"):
        yield "--fp16 and --bf16 contradict each other. Pass one of them, or neither for the device's best."


def _demo_values(kinds: Mapping[str, Any], problems: list[str]) -> dict[str, Given]:
    values = yaml_values(DEMO_FOLDER / "demo.yaml", kinds, problems)
    values["dataset_path"] = Given(str(DEMO_FOLDER / "persona.jsonl"), "the demo")
    values["model_path"] = Given(str(DEMO_FOLDER / "base"), "the demo")
    return values


def _validated(group: type[S], given: Mapping[str, Given], problems: list[str]) -> S | None:
    kinds = kinds_of((group,))
    values = {name: _listed(given[name].value, kinds[name]) for name in given.keys() & kinds.keys()}
    try:
        return group(**values)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0])
            place = given[name].called(name) if name in given else f"--{name}"
            problems.append(f"{place}: {problem['msg'].removeprefix('Value error, ')}.")
        return None


def _listed(value: Any, kind: Any) -> Any:
    """A list setting may be one word, words, or words joined by commas."""
    if "true" in typing.get_args(kind):  # auto|true|false, however true is written
        return str(value).lower()
    if typing.get_origin(kind) is not list:
        return value
    words = value if isinstance(value, list) else [value]
    return [part for word in words for part in str(word).split(",") if part]


def _checked(name: str, one: Given, kind: Any, problems: list[str]) -> Any:
    """A Trainer's value as its own type; `{…}` is JSON."""
    value = one.value
    if isinstance(value, str) and value.lower() in ("true", "false") and bool in typing.get_args(kind):
        return value.lower() == "true"
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            problems.append(f"{one.called(name)}: not JSON: {error}.")
            return None
    try:
        return TypeAdapter(kind, config=ConfigDict(coerce_numbers_to_str=True)).validate_python(value)
    except ValidationError as error:
        problems.append(f"{one.called(name)}: {error.errors()[0]['msg']}.")
        return None
