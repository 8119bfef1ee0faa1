"""Config: settings/fields.py's fields filled from flags and YAML, and checked.

Before: settings/flags.py, what flags and YAML say.  After: cli.py hands the settings to a command.
default < YAML < flag, and where each value came from is remembered. All problems are reported at once, before data or
model is touched. transformers.TrainingArguments' own settings pass under their own names.
"""

import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from atomtune.errors import BadSettings
from atomtune.settings.fields import (
    ChatSettings,
    DataSettings,
    InspectSettings,
    LoraSettings,
    MergeSettings,
    ModelSettings,
    RunSettings,
    TrainSettings,
    VerifySettings,
)
from atomtune.settings.flags import Given, given_values, kinds_of, library_kinds, yaml_values

S = TypeVar("S")


#: TrainingArguments whose defaults are set for LoRA on a small data set, and why.
LIBRARY_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-4,  # the tutorial's; transformers' 5e-5 is for full fine-tuning
    "per_device_train_batch_size": 16,  # the tutorial's
    "logging_steps": 10,  # the tutorial's
    "save_total_limit": 3,  # the tutorial's
    "report_to": "none",
}


TRAIN_GROUPS = (DataSettings, ModelSettings, LoraSettings, RunSettings)
SETTINGS_OF: dict[str, type] = {
    "inspect": InspectSettings,
    "verify": VerifySettings,
    "merge": MergeSettings,
    "chat": ChatSettings,
}
DEMO_FOLDER = Path(__file__).parents[1] / "demo"


def read(command: str, argv: Sequence[str]) -> Any:
    """The settings of one command."""
    return read_train(argv) if command == "train" else read_settings(SETTINGS_OF[command], argv, command=command)


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
    problems += [*_named_wrongly(settled), *_contradictions(settled, given)]
    if problems:
        raise BadSettings(problems)
    origins = dict.fromkeys(LIBRARY_DEFAULTS, "atomtune's default") | {n: g.source for n, g in given.items()}
    data, model, lora, run = groups
    return TrainSettings(data=data, model=model, lora=lora, run=run, trainer=trainer, origins=origins, demo=demo)


def read_settings(group: type[S], argv: Sequence[str], *, command: str) -> S:
    """Settings of a command with one group and no Trainer."""
    given, problems = given_values(argv, kinds_of((group,)), (group,), command=command)
    settings = _validated(group, given, problems)
    problems += _named_wrongly(vars(settings)) if settings is not None else []
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
    if on("streaming") and not settled.get("max_steps", 0) > 0:
        yield "--streaming needs --max_steps: how many records there are is not known before they are read."
    for name in ("eval_size", "mix"):
        if on("streaming") and on(name):
            yield f"--{name} draws from all records, which --streaming never holds. Leave one of them out."
    if on("streaming") and on("dataloader_num_workers"):
        yield "--dataloader_num_workers: with --streaming each would read everything. Large files use all cores anyway."
    if on("fp16") and on("bf16"):
        yield "--fp16 and --bf16 contradict each other. Pass one of them, or neither for the device's best."


def _named_wrongly(settled: Mapping[str, Any]) -> Iterator[str]:
    for name, example in (("keys", "question=instruction"), ("roles", "bot=assistant")):
        for word in settled.get(name) or []:
            if not all(word.partition("=")):
                yield f"--{name} {word!r}: expected theirs=ours, as {example}."
    files, mix = settled.get("dataset_path") or [], settled.get("mix") or []
    count = 1 if isinstance(files, str) else len(files)
    if mix and len(mix) != count:
        yield f"--mix has {len(mix)} numbers for {count} files. Pass one a file, in their order."
    if any(weight < 0 for weight in mix) or (mix and not any(mix)):
        yield "--mix: a file's records are seen 0 times or more, and some file's more than 0 times."


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
