"""Help: `--help` of a command shows the settings that most users change, `--help all` shows all of them."""

import inspect
import shutil
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.fields import FieldInfo

from atomtune.console import wrapped
from atomtune.errors import EXIT_CODE_MEANINGS
from atomtune.language import translated
from atomtune.settings.expect import choices_in, default_of, field_infos
from atomtune.settings.flags import OF_A_RUN, flag_of
from atomtune.settings.library import choices_of, library_settings

NARROW, WIDE = 40, 110  # columns
INDENT = " " * 6

NAMES_IN_FLAG = 60  # characters of one|of|these; longer lists are written in the help line

#: In the order in which a record passes through them; a command's own settings follow.
HEADINGS = ["Data", "Model", "LoRA", "Training", "Run"]

#: The arguments of each command.
USAGE = {
    "train": "[run.yaml] [--setting value …]",
    "inspect": "FILE … --model_path FOLDER_OR_NAME [--setting value …]",
    "plan": "[run.yaml] [--setting value …]",
    "sweep": "[run.yaml] [--try NAME=A,B …] [--setting value …]",
    "verify": "--model_path FOLDER_OR_NAME --dataset_path FILE [--setting value …]",
    "evaluate": "--adapter_path FOLDER [--dataset_path FILE] [--setting value …]",
    "certify": "--adapter_path FOLDER [--served FOLDER_OR_FILE] [--setting value …]",
    "export": "--adapter_path FOLDER --output_dir FOLDER [--to gguf] [--setting value …]",
    "merge": "--adapter_path FOLDER --output_dir FOLDER [--setting value …]",
    "serve": "--adapter_path FOLDER … [--served FOLDER_OR_FILE] [--setting value …]",
    "runs": "[FOLDER …] [--setting value …]",
    "chat": "--adapter_path FOLDER [--setting value …]",
    "web": "--adapter_path FOLDER [--setting value …]",
}
EXAMPLES = {
    "train": [
        "--model_path Qwen/Qwen3-0.6B --dataset_path train.jsonl --output_dir out",
        "run.yaml --learning_rate 5e-4",
    ],
    "inspect": [
        "train.jsonl --model_path Qwen/Qwen3-0.6B --html report.html",
        "train.jsonl --model_path Qwen/Qwen3-0.6B --fail_on refused duplicates=5%",
    ],
    "plan": [
        "--model_path Qwen/Qwen3-0.6B --dataset_path train.jsonl",
        "run.yaml --quantize nf4 --json",
    ],
    "sweep": [
        "--model_path Qwen/Qwen3-0.6B --dataset_path train.jsonl --output_dir sweep",
        "run.yaml --try learning_rate=1e-4,3e-4,1e-3 --try lora_rank=8,32",
    ],
    "verify": [
        "--model_path Qwen/Qwen3-0.6B --dataset_path train.jsonl",
        "--model_path Qwen/Qwen3-0.6B --dataset_path train.jsonl --dtype float32 --records 64",
    ],
    "evaluate": [
        "--adapter_path out",
        "--adapter_path out other-out --dataset_path test.jsonl --output_dir compared",
    ],
    "certify": [
        "--adapter_path out",
        "--adapter_path out --served out-gguf/out-q8_0.gguf",
    ],
    "export": [
        "--adapter_path out --output_dir out-gguf --quantize q8_0",
        "--adapter_path out --output_dir out-full --to peft --for_class Gemma3ForConditionalGeneration",
    ],
    "merge": [
        "--adapter_path out --output_dir out-merged",
        "--adapter_path out/checkpoint-500 --output_dir out-merged --dtype bfloat16",
    ],
    "serve": [
        "--adapter_path out",
        "--adapter_path out --served out-gguf/out-q8_0.gguf --port 8080",
        "--adapter_path polite terse --engine vllm",
    ],
    "runs": [
        "runs",
        "out other-out --plot losses.png",
    ],
    "chat": [
        "--adapter_path out",
        '--adapter_path out --prompt "Who are you?" --temperature 0.7',
    ],
    "web": [
        "--adapter_path out --open",
        "--adapter_path out --host 0.0.0.0 --password SECRET",
    ],
}

#: What a command does, in addition to its line in the overview.
ABOUT = {
    "train": "Without --model_path and --dataset_path, the built-in demo is trained. run.yaml holds the same settings "
    "as lines of `name: value`; a flag takes precedence.",
    "serve": "The server is the engine's own. Before serving, atomtune checks that it serves the tuned model, as "
    "`atomtune certify` does. Ctrl-C stops it.",
    "sweep": "It takes every setting of `atomtune train` for all its trials, and --try for what varies between "
    "them. Each trial is a run in a folder of its own; all hold out the same records. --resume continues a sweep that "
    "was stopped, and retries what failed.",
    "web": "The page streams answers, lets you stop an answer, edit a question and ask again, and shows the base's "
    "answer next to the tuned model's. It makes no external requests; Ctrl-C stops it.",
    "plan": "It takes every setting of `atomtune train`: write `plan` in place of `train`.",
}

#: Help lines of settings that mean something else in a command that takes them over from another one.
BORROWED = {
    "sweep": {
        "output_dir": "folder for the trials, one folder each, and sweep.json; default: a new folder runs/sweep-NAME-1",
        "resume": "continue the sweep in --output_dir: finished trials are kept, stopped or failed ones are tried "
        "again",
    }
}


def help_text(command: str, summary: str, groups: Sequence[type[Any]], *, everything: bool) -> str:
    """The whole help text in the language in use, wrapped between words to the width of the terminal."""
    width = min(max(shutil.get_terminal_size().columns, NARROW), WIDE)
    lines = [*_wrapped(translated(f"usage: atomtune {command} {USAGE[command]}"), width, indent=INDENT), ""]
    about = translated(ABOUT[command]) if command in ABOUT else ""
    lines += _wrapped(translated(f"{summary} ") + about, width)
    sections = _sections(command, groups, everything=everything)
    if everything and command in OF_A_RUN:
        sections["More settings, of transformers.Trainer"] = _library_lines(field_infos(groups))
    for title, settings in sections.items():
        lines += ["", translated(title) + translated(":")]
        for flag, text in settings:
            lines += _wrapped(f"  {flag}", width, indent=INDENT)
            lines += _wrapped(f"{INDENT}{text}", width, indent=INDENT)
    if not everything:
        further = translated(f"`atomtune {command} --help all` shows all settings, `--help json` prints them as JSON.")
        lines += ["", *_wrapped(further, width)]
    lines += ["", translated("Examples:")]
    lines += [f"  atomtune {command} {example}" for example in EXAMPLES[command]]
    lines += ["", translated("Exit codes:")]
    for code, meaning in EXIT_CODE_MEANINGS.items():
        lines += _wrapped(f"{code:>4}  {translated(meaning)}", width, indent=INDENT)
    return "\n".join(lines)


def _wrapped(text: str, width: int, *, indent: str = "") -> list[str]:
    """The text as lines, wrapped between words; a word longer than a line stays whole, so that it can be copied."""
    return wrapped(text, width, indent=len(indent), long_words_apart=True).split("\n")


def _sections(command: str, groups: Sequence[type[Any]], *, everything: bool) -> dict[str, list[tuple[str, str]]]:
    """heading → (flag, help line); a setting is listed under the class that declares it."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for group in groups:
        types = typing.get_type_hints(group)
        for name, info in field_infos([group]).items():
            if everything or not extra_of(info, "rare"):
                settings = sections.setdefault(heading_of(group, name), [])
                flag = f"{flag_of(name)} {_placeholder(name, types[name], info)}"
                settings.append((flag, _described(command, name, info)))
    ordered = [heading for heading in HEADINGS if heading in sections]
    ordered += [heading for heading in sections if heading not in HEADINGS]
    return {heading: sections[heading] for heading in ordered}


def heading_of(group: type[Any], name: str) -> str:
    declaring = next(cls for cls in group.__mro__ if name in inspect.get_annotations(cls))
    return str(declaring.__doc__)


def extra_of(info: FieldInfo, key: str) -> Any:
    return info.json_schema_extra.get(key) if isinstance(info.json_schema_extra, dict) else None


def meaning_of(command: str, name: str, info: FieldInfo) -> str:
    """What a setting does in a command."""
    return BORROWED.get(command, {}).get(name, str(info.description))


def _described(command: str, name: str, info: FieldInfo) -> str:
    """What a setting does, and its default, as a help line."""
    meaning = meaning_of(command, name, info)
    text = translated(meaning)
    choices = _library_choices(name)
    if len("|".join(choices)) > NAMES_IN_FLAG:
        text += translated(": ") + ", ".join(choices)
    if info.is_required():
        return f"{text} {translated('(required)')}"
    default = default_of(info)
    if default is None or default is False or default == [] or "default:" in meaning:
        return text
    return f"{text} [{_shown(default)}]"


def _shown(default: Any) -> str:
    if isinstance(default, list):
        return " ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _placeholder(name: str, kind: Any, info: FieldInfo | None = None) -> str:
    """The placeholder of a value: FILE, N, one|of|these."""
    choices = "|".join(choices_of_setting(name, kind))
    if len(choices) > NAMES_IN_FLAG:
        choices = "NAME"
    own_word = extra_of(info, "value") if info else None
    word = own_word or choices or _placeholder_of_type(kind)
    takes_list = any(typing.get_origin(part) is list for part in (kind, *typing.get_args(kind)))
    return f"{word} …" if takes_list else word


def choices_of_setting(name: str, kind: Any) -> tuple[str, ...]:
    """The valid values of a setting if they are a list of names, else empty."""
    if bool in (kind, *typing.get_args(kind)):
        return ("true", "false")
    return choices_in(kind) or _library_choices(name)


def _library_choices(name: str) -> tuple[str, ...]:
    setting = library_settings().get(name)
    return choices_of(setting) if setting else ()


def _placeholder_of_type(kind: Any) -> str:
    parts = {kind, *typing.get_args(kind)}
    for part, word in ((bool, "true|false"), (float, "X"), (int, "N"), (dict, "JSON")):
        if part in parts or any(typing.get_origin(member) is part for member in parts):
            return word
    return "TEXT"


def _library_lines(own: Mapping[str, FieldInfo]) -> list[tuple[str, str]]:
    """The Trainer's settings that are not declared by atomtune, with the library's own help."""
    lines = []
    for name, setting in library_settings().items():
        if name in own:
            continue
        text = setting.help
        choices = choices_of(setting)
        if len("|".join(choices)) > NAMES_IN_FLAG:
            text += f": {', '.join(choices)}"
        if setting.default not in (None, False, ""):
            text += f" [{_shown(setting.default)}]"
        lines.append((f"--{name} {_placeholder(name, setting.type)}", text))
    return lines
