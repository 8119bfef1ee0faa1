"""Read: fills the settings' classes from flags and YAML, or from a function's keywords, and checks them.

Later ones win: default < YAML < flag or keyword; where each value was set is recorded. All problems are reported at
once, before data or model are read. Settings of transformers.TrainingArguments keep their names.
"""

import contextlib
import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from atomtune.errors import BadSettings
from atomtune.settings.command_settings import (
    CertifySettings,
    ChatSettings,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    MergeSettings,
    PlanOutput,
    RunsSettings,
    ServeSettings,
    SweepChoices,
    TrainOutput,
    VerifySettings,
    WebSettings,
)
from atomtune.settings.contradictions import contradictions
from atomtune.settings.earlier_run import entries_of_earlier_run
from atomtune.settings.entry import OF_THE_DEMO, OWN_DEFAULT, Entry
from atomtune.settings.environment import cache_notices, environment_problems, waiting_notice
from atomtune.settings.expect import choices_in, expected, field_infos, members_of
from atomtune.settings.flags import EntryReader, types_of
from atomtune.settings.library import choices_of, library_settings, library_types
from atomtune.settings.names import value_advice
from atomtune.settings.run_settings import (
    AUTOMATIC,
    CHANGED_DEFAULTS,
    DataSettings,
    LoraSettings,
    ModelSettings,
    RunSettings,
    TrainerSettings,
)
from atomtune.settings.train_settings import PlanSettings, SweepSettings, TrainSettings
from atomtune.settings.tried import NOT_SHARED, as_words, not_comparable, points_of, values_tried

S = TypeVar("S")

OWN_GROUPS = (DataSettings, ModelSettings, LoraSettings, RunSettings)
TRAIN_GROUPS = (DataSettings, ModelSettings, LoraSettings, TrainerSettings, RunSettings)
GROUPS: dict[str, tuple[type[Any], ...]] = {
    "train": (*TRAIN_GROUPS, TrainOutput),
    "inspect": (InspectSettings,),
    "plan": (PlanOutput, *TRAIN_GROUPS),
    "sweep": (SweepChoices, *TRAIN_GROUPS),
    "verify": (VerifySettings,),
    "evaluate": (EvaluateSettings,),
    "certify": (CertifySettings,),
    "export": (ExportSettings,),
    "serve": (ServeSettings,),
    "runs": (RunsSettings,),
    "merge": (MergeSettings,),
    "chat": (ChatSettings,),
    "web": (WebSettings,),
}
#: Values for the Trainer unless the user sets them, in place of its own defaults.
LIBRARY_DEFAULTS: dict[str, Any] = {
    **{name: field_infos([TrainerSettings])[name].default for name in CHANGED_DEFAULTS},
    "report_to": "none",
}
DEMO_FOLDER = Path(__file__).parents[1] / "demo"
#: Example values of list settings, for messages.
EXAMPLES = {"dataset_path": "train.jsonl", "keys": "question=instruction", "roles": "bot=assistant"}

#: What a command needs, though its class shares the setting with commands that do not need it.
_NEEDED = {"inspect": ("dataset_path", "model_path"), "verify": ("dataset_path", "model_path")}
#: Most combinations of a sweep; each is checked before the first trial.
MOST_COMBINATIONS = 10_000
#: Largest whole number, which a float can represent exactly. A run of 10**39 steps is a typing error, but would start.
_MOST_NUMBER = 2**53
_LIBRARY_VALUES = ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)


def _say_nothing(_: str) -> None:
    pass


#: The words of a command line, or the keywords of a function: name → value.
Written = Sequence[str] | Mapping[str, Any]


def read(command: str, written: Written, *, notice: Callable[[str], None] = _say_nothing) -> Any:
    """The settings of a command. Raises BadSettings with all problems."""
    if command == "train":
        return read_train(written, notice=notice)
    if command == "plan":
        return read_plan(written, notice=notice)
    if command == "sweep":
        return read_sweep(written, notice=notice)
    return read_settings(GROUPS[command][0], written, command=command, notice=notice)


def read_train(written: Written, *, notice: Callable[[str], None] = _say_nothing) -> TrainSettings:
    """Settings of `atomtune train [run.yaml] --flag value …`. Raises BadSettings with all problems."""
    train, output = _run_and_output("train", TrainOutput, written, notice)
    return replace(train, json=output.json)


def read_plan(written: Written, *, notice: Callable[[str], None] = _say_nothing) -> PlanSettings:
    """Settings of `atomtune plan`: those of the planned run, and its own. Raises BadSettings with all problems."""
    train, output = _run_and_output("plan", PlanOutput, written, notice)
    return PlanSettings(train=train, json=output.json)


def _run_and_output(
    command: str, group: type[S], written: Written, notice: Callable[[str], None]
) -> tuple[TrainSettings, S]:
    """The settings of a run, and those that a command adds to them. Raises BadSettings with all problems."""
    reader = _reader_of_run(command)
    output, of_the_run = _apart(group, reader, _entries_of_run(reader, written, notice))
    train = _train_settings(reader, of_the_run, written, notice)
    assert output is not None
    return train, output


def _reader_of_run(command: str) -> EntryReader:
    """A reader of the command's settings and of all settings of the Trainer."""
    return EntryReader(command, {**library_types(), **types_of(GROUPS[command])})


def _apart(group: type[S], reader: EntryReader, entries: Mapping[str, Entry]) -> tuple[S | None, dict[str, Entry]]:
    """The settings of a command's own class (None if invalid), and the entries that belong to the run."""
    own = types_of((group,))
    output = _validated(group, {name: entry for name, entry in entries.items() if name in own}, reader.problems)
    return output, {name: entry for name, entry in entries.items() if name not in own}


def read_sweep(written: Written, *, notice: Callable[[str], None] = _say_nothing) -> SweepSettings:
    """Settings of `atomtune sweep`; those of each trial are checked too. Raises BadSettings with all problems."""
    reader = _reader_of_run("sweep")
    entries = _entries(reader, written, notice)
    if "try_" in entries:
        entries["try_"] = replace(entries["try_"], value=as_words(entries["try_"].value))
    if not entries.keys() & {"dataset_path", "model_path"}:
        if entries.keys() & {"eval_size", "eval_path"}:
            entries = {**_demo_entries(reader), **entries}
        else:  # the demo would have no held-out records
            reader.problems.append("A sweep needs --model_path and --dataset_path, also when it is resumed.")
    choices, of_the_run = _apart(SweepChoices, reader, entries)
    tried = values_tried(choices, reader.known_setting, reader.problems) if choices else {}
    _check_trials(of_the_run, tried, reader, written)
    train = _train_settings(reader, of_the_run, written, notice)
    assert choices is not None
    shared = {name: entry.value for name, entry in of_the_run.items() if name not in NOT_SHARED}
    return SweepSettings(train=train, shared=shared, tried=tried, trials=choices.trials, json=choices.json)


def _check_trials(
    shared: Mapping[str, Entry], tried: Mapping[str, tuple[str, ...]], reader: EntryReader, written: Written
) -> None:
    """Check every combination as its run will read it; problems of the shared settings are reported elsewhere."""
    values = {name: entry.value for name, entry in shared.items()}
    reader.problems += not_comparable(values, tried)
    combinations = math.prod(map(len, tried.values()))
    if combinations > MOST_COMBINATIONS:
        reader.problems.append(
            f"--try makes {combinations:,} combinations; at most {MOST_COMBINATIONS:,} are allowed. Try fewer values."
        )
        return
    problems: dict[str, None] = {}  # a dict keeps the order and drops duplicates
    for point in points_of(tried):
        entries = {name: Entry(value, f"--try {name}") for name, value in point.items()}
        problems |= dict.fromkeys(_problems_of_run(reader, {**shared, **entries}, written))
    known = _problems_of_run(reader, shared, written)
    reader.problems += [problem for problem in problems if problem not in known]


def _problems_of_run(reader: EntryReader, entries: Mapping[str, Entry], written: Written) -> list[str]:
    of_the_run = EntryReader(reader.command, reader.types)
    with contextlib.suppress(BadSettings):
        _train_settings(of_the_run, dict(entries), written, _say_nothing)
    return of_the_run.problems


def _train_settings(
    reader: EntryReader, entries: dict[str, Entry], written: Written, notice: Callable[[str], None]
) -> TrainSettings:
    demo = not entries.keys() & {"dataset_path", "model_path"}
    if demo and (DEMO_FOLDER / "demo.yaml").is_file():
        entries = {**_demo_entries(reader), **entries}

    problems = reader.problems
    problems += _half_of_a_run(entries)
    groups: dict[type, Any] = {group: _validated(group, entries, problems) for group in TRAIN_GROUPS}
    trainer = _trainer_values(groups[TrainerSettings], entries, problems)
    values = _values_of(groups.values()) | trainer
    problems += _ill_formed(values)
    problems += contradictions(values, entries.keys())
    problems += environment_problems()
    if problems:
        raise BadSettings(problems)

    if waiting := waiting_notice():
        notice(waiting)
    for line in cache_notices():
        notice(line)
    origins = dict.fromkeys(LIBRARY_DEFAULTS, OWN_DEFAULT)
    for name, entry in entries.items():
        origins[name] = entry.origin
    data, model, lora, run = (groups[group] for group in OWN_GROUPS)
    return TrainSettings(
        data=data,
        model=model,
        lora=lora,
        run=run,
        trainer=trainer,
        origins=origins,
        demo=demo,
        argv=None if isinstance(written, Mapping) else tuple(written),
    )


def _half_of_a_run(entries: Mapping[str, Entry]) -> list[str]:
    """A model without data is a mistake, and so is data without a model; only without both the demo is meant."""
    problems = []
    for name, other in (("dataset_path", "model_path"), ("model_path", "dataset_path")):
        if name in entries and other not in entries:
            problems.append(f"--{name} is given without --{other}. Pass both, or neither for the built-in demo.")
    return problems


def read_settings(group: type[S], written: Written, *, command: str, notice: Callable[[str], None] = _say_nothing) -> S:
    """Settings of a command with one class and no Trainer. Raises BadSettings with all problems."""
    reader = EntryReader(command, types_of((group,)))
    entries = _entries(reader, written, notice)
    settings = _validated(group, entries, reader.problems)
    if settings is not None:
        infos = field_infos([group])
        reader.problems += [
            _missing(name, infos[name]) for name in _NEEDED.get(command, ()) if not getattr(settings, name)
        ]
        reader.problems += _ill_formed(vars(settings))
        reader.problems += contradictions(vars(settings), entries.keys())
    if reader.problems or settings is None:
        raise BadSettings(reader.problems)
    return settings


def _entries(reader: EntryReader, written: Written, notice: Callable[[str], None]) -> dict[str, Entry]:
    entries = reader.read_keywords(written) if isinstance(written, Mapping) else reader.read(written)
    if reader.translated:
        notice(f"names of other tools, read as atomtune's: {', '.join(reader.translated)}.")
    if reader.repeated:
        notice(f"given more than once: {', '.join(reader.repeated)}. The last one counts.")
    # `auto` replaces a value in run.yaml, as if none were written.
    return {name: entry for name, entry in entries.items() if name not in AUTOMATIC or entry.value != "auto"}


def _entries_of_run(reader: EntryReader, written: Written, notice: Callable[[str], None]) -> dict[str, Entry]:
    """The entries of one run; if it resumes another one, that one's settings come first."""
    entries = _entries(reader, written, notice)
    earlier = entries_of_earlier_run(entries, reader.types)
    if earlier:
        origin = next(iter(earlier.values())).origin
        notice(f"what the command does not set is taken from the run that it resumes ({origin}).")
    return {**earlier, **entries}


def _demo_entries(reader: EntryReader) -> dict[str, Entry]:
    return {
        **reader.read_yaml(DEMO_FOLDER / "demo.yaml"),
        "dataset_path": Entry(str(DEMO_FOLDER / "persona.jsonl"), OF_THE_DEMO),
        "model_path": Entry(str(DEMO_FOLDER / "base"), OF_THE_DEMO),
    }


def _validated(group: type[S], entries: Mapping[str, Entry], problems: list[str]) -> S | None:
    """A class filled from the entries; None, with a problem added, if one of them is invalid."""
    types, infos = types_of((group,)), field_infos([group])
    values = {name: _value(entries[name], types[name], infos[name]) for name in types if name in entries}
    try:
        return group(**values)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0])
            text = _misfit(name, entries.get(name), types[name], infos[name])
            if text not in problems:  # an invalid list gives one error per word
                problems.append(text)
        return None


def _misfit(name: str, entry: Entry | None, kind: Any, info: FieldInfo) -> str:
    """The message for a setting that its class did not accept."""
    if entry is None:
        return _missing(name, info)
    if _holds_mappings(entry.value):
        paths = [str(item["path"]) for item in entry.value if isinstance(item, dict) and item.get("path")]
        example = f"[{', '.join(paths)}]" if len(paths) > 1 else "".join(paths) or EXAMPLES.get(name, "a b")
        told = " Its format is detected from its records." if paths else ""
        return f"{entry.origin}: {name}: expected words, for example `{name}: {example}`.{told}"
    advised = value_advice(name, entry.value, in_yaml=not entry.origin.startswith("--"), choices=choices_in(kind))
    if bool in members_of(kind) and Path(str(entry.value)).suffix in (".yaml", ".yml"):
        advised = f" A file of settings stands before the flags: {entry.value} --{name}."
    return f"{entry.place(name)}: expected {expected(kind, info)}.{advised}"


def _missing(name: str, info: FieldInfo) -> str:
    return f"--{name} is missing: {info.description}."


def _holds_mappings(value: Any) -> bool:
    """Whether a value has mappings, like `datasets: [{path: …, type: …}]` in other tools."""
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _value(entry: Entry, kind: Any, info: FieldInfo) -> Any:
    """The value for a setting; list settings accept one word, several words, or words joined by commas.

    A folder or file that is there under the whole word is one, even with a comma in its name.
    """
    if "true" in typing.get_args(kind):  # auto|true|false, in any spelling
        return str(entry.value).lower()
    if typing.get_origin(kind) is not list:
        return entry.value
    words = entry.value if isinstance(entry.value, list) else [entry.value]
    extra = info.json_schema_extra
    meaning = extra["value"] if isinstance(extra, dict) else None
    parts: list[str] = []
    for word in map(str, words):
        if meaning in ("FOLDER", "TASK") and Path(word).exists():
            parts.append(word)
        elif meaning == "THEIRS=OURS":
            parts += _pairs_in(word)
        else:
            parts += word.split(",")
    return [part for part in parts if part]


def _pairs_in(word: str) -> list[str]:
    """The pairs in `a=b,c=d`. Our names have no comma, so one before the "=" is part of theirs: `city, state=input`."""
    pairs: list[str] = []
    for part in word.split(","):
        if pairs and "=" not in pairs[-1]:
            pairs[-1] += f",{part}"
        else:
            pairs.append(part)
    return pairs


def _trainer_values(
    declared: TrainerSettings | None, entries: Mapping[str, Entry], problems: list[str]
) -> dict[str, Any]:
    """The Trainer's values: our defaults, and all settings of the user, converted to their types."""
    own, with_our_ranges = types_of(OWN_GROUPS), types_of((TrainerSettings,))
    library = library_settings()
    values = dict(LIBRARY_DEFAULTS)
    for name, entry in entries.items():
        if name in own:
            continue
        if name not in with_our_ranges:
            values[name] = _library_value(name, entry, library[name].type, problems)
        elif declared is not None:
            values[name] = getattr(declared, name)
        choices = choices_of(library[name])
        if choices and entry.value is not None and str(entry.value) not in choices:
            advised = value_advice(name, entry.value, in_yaml=not entry.origin.startswith("--"), choices=choices)
            problems.append(f"{entry.place(name)}: expected one of {', '.join(choices)}.{advised}")
    return values


def _library_value(name: str, entry: Entry, kind: Any, problems: list[str]) -> Any:
    """A Trainer's value converted to its type; `{…}` is read as JSON."""
    value = entry.value
    if isinstance(value, str) and value.lower() in ("true", "false") and bool in typing.get_args(kind):
        return value.lower() == "true"
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            problems.append(f"{entry.place(name)}: not JSON: {error}.")
            return None
    if not _is_finite(value):
        problems.append(f"{entry.place(name)}: NaN and infinity are not allowed here.")
        return None
    members = typing.get_args(kind | None)
    if isinstance(value, str) and list[str] in members and str not in members:
        value = [value]  # one word is a list of one
    try:
        return TypeAdapter(kind, config=_LIBRARY_VALUES).validate_python(value)
    except ValidationError:
        advised = value_advice(name, value, in_yaml=not entry.origin.startswith("--"))
        problems.append(f"{entry.place(name)}: expected {expected(kind)}.{advised}")
        return None


def _is_finite(value: Any) -> bool:
    """Whether all numbers are finite, also in lists and objects; YAML has .nan, and JSON 1e400."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _values_of(groups: typing.Iterable[Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for group in groups:
        if group is not None:  # None if its problems were reported
            values |= vars(group)
    return values


def _ill_formed(values: Mapping[str, Any]) -> list[str]:
    """Problems of numbers that are too large, and of lists whose words need a certain form."""
    problems = []
    for name, value in values.items():
        if isinstance(value, int) and abs(value) > _MOST_NUMBER:
            problems.append(f"--{name} {str(value)[:60]!r}: expected a whole number of at most {_MOST_NUMBER:,}.")
    for name in ("keys", "roles"):
        for word in values.get(name) or []:
            if not all(word.partition("=")):
                problems.append(f"--{name} {word!r}: expected THEIRS=OURS, for example {EXAMPLES[name]}.")
    paths, mix = values.get("dataset_path") or [], values.get("mix") or []
    count = 1 if isinstance(paths, str) else len(paths)
    if mix and len(mix) != count:
        problems.append(
            f"--mix has {len(mix)} numbers for {count} files. Pass one number per file, in the order of the files."
        )
    if any(weight < 0 for weight in mix) or (mix and not any(mix)):
        problems.append("--mix: expected numbers of 0 or more, one of them more than 0.")
    return problems
