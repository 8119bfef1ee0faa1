"""Sources: what flags and a YAML file say, before anyone asks whether it may be said.

transformers.TrainingArguments' names and types are read from that file's text, so
that a wrong flag is answered without importing torch.
"""

import argparse
import ast
import difflib
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import yaml

from atomtune.errors import BadSettings

#: Names that were in older transformers, and what to write now.
RENAMED = {
    "warmup_ratio": "--warmup_steps with a number below 1",
    "group_by_length": "--train_sampling_strategy group_by_length",
    "overwrite_output_dir": "--resume, or another --output_dir",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "no_cuda": "--use_cpu",
    "save_safetensors": "nothing: adapters are always saved as safetensors",
    "evaluation_strategy": "--eval_strategy",
    "per_gpu_train_batch_size": "--per_device_train_batch_size",
    "check_point": "--checkpoint",
}


@dataclass(frozen=True)
class Given:
    """A value as the user wrote it, and where: a flag, or a line of a file."""

    value: Any
    source: str

    def called(self, name: str) -> str:
        """How an error names it: `--lora_rank 'x'`, `run.yaml:3 lora_rank 'x'`."""
        return f"{self.source if self.source.startswith('--') else f'{self.source} {name}'} {self.value!r}"


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's plain words: 1e-4 is a number, `no` is a word, a date is a word. PyYAML reads YAML 1.1."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # as PyYAML declares it


_Yaml.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def kinds_of(groups: Sequence[type]) -> dict[str, Any]:
    """Name → type of every setting of these groups."""
    return {name: kind for group in groups for name, kind in typing.get_type_hints(group).items()}


def given_values(
    argv: Sequence[str], kinds: Mapping[str, Any], groups: Sequence[type], *, command: str
) -> tuple[dict[str, Given], list[str]]:
    """What YAML and flags say, flags last, and the problems met."""
    problems: list[str] = []
    words = list(_known(argv, kinds, problems))
    try:
        parsed, left = parser_of(kinds, groups, command=command).parse_known_args(words)
    except argparse.ArgumentError as error:
        raise BadSettings([*problems, f"{error.argument_name or command}: {error.message}."]) from None
    problems += [f"{word}: belongs to no setting." for word in left]
    spoken = vars(parsed)
    given: dict[str, Given] = {}
    if yaml_file := spoken.pop("yaml", None):
        given |= yaml_values(Path(yaml_file), kinds, problems)
    if paths := spoken.pop("paths", None):
        given["dataset_path"] = Given(paths, "the word behind the command")
    for name, value in spoken.items():
        if value is not None:
            single = value[0] if isinstance(value, list) and len(value) == 1 else value
            given[name] = Given(single, f"--{name}")
    return given, problems


def _known(argv: Sequence[str], kinds: Mapping[str, Any], problems: list[str]) -> Iterator[str]:
    """The words without unknown flags and their values; each unknown flag becomes a problem with the nearest name."""
    passing_over = False
    for word in map(_underscored, argv):
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            passing_over = name not in kinds and name != "help"
            if passing_over:
                problems.append(f"--{name}: {_advice(name, kinds)}")
        if not passing_over:
            yield word


def _underscored(word: str) -> str:
    """--max-seq-length is --max_seq_length."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _advice(name: str, kinds: Mapping[str, Any]) -> str:
    name = name.replace("-", "_")
    if name in RENAMED:
        return f"gone; use {RENAMED[name]}."
    near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.6)
    return f"unknown. Did you mean --{near[0]}?" if near else "unknown. --help lists the names."


def yaml_values(path: Path, kinds: Mapping[str, Any], problems: list[str]) -> dict[str, Given]:
    """Top-level keys of a YAML file, each with its line."""
    if not path.is_file():
        problems.append(f"{path}: no such file. The word behind `train` is a YAML file; settings begin with --.")
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = yaml.compose(text, Loader=_Yaml)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"{path}: not YAML in UTF-8: {error}")
        return {}
    if tree is None:
        return {}
    if not isinstance(tree, yaml.MappingNode):
        problems.append(f"{path}: expected `name: value` lines at the top.")
        return {}
    given: dict[str, Given] = {}
    constructor = _Yaml("")
    for key_node, value_node in tree.value:
        name, place = str(key_node.value).replace("-", "_"), f"{path.name}:{key_node.start_mark.line + 1}"
        if name not in kinds:
            problems.append(f"{place}: {key_node.value}: {_advice(name, kinds)}")
        elif name in given:
            problems.append(f"{place}: {name} stands here a second time; the first is at {given[name].source}.")
        else:
            try:
                given[name] = Given(_written(value_node, constructor), place)
            except (yaml.YAMLError, ValueError) as error:
                problems.append(f"{place} {name}: {error}.")
    return given


@cache
def library_kinds() -> dict[str, Any]:
    """Name → type of every transformers.TrainingArguments setting, read from its source without importing it."""
    package = find_spec("transformers")
    assert package is not None and package.origin is not None, "transformers is a dependency"
    source = Path(package.origin).with_name("training_args.py").read_text(encoding="utf-8")
    body = next(
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    return {
        node.target.id: bool | _plain_kind(node.annotation)
        if _may_stand_alone(node.value)
        else _plain_kind(node.annotation)
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
    }


def _may_stand_alone(value: ast.expr | None) -> bool:
    """Whether a setting's flag means True without a value, as `field(metadata={"const": True})` says (--fsdp)."""
    dicts = [node for node in ast.walk(value) if isinstance(node, ast.Dict)] if value else []
    pairs = [pair for one in dicts for pair in zip(one.keys, one.values, strict=True)]
    return any(
        isinstance(key, ast.Constant)
        and key.value == "const"
        and isinstance(const, ast.Constant)
        and const.value is True
        for key, const in pairs
    )


def _plain_kind(node: ast.expr) -> Any:
    """An annotation as a plain type; enumerations of transformers are text here, the Trainer checks their values."""
    kind: Any = str
    match node:
        case ast.Name(id=name):
            kind = {"int": int, "float": float, "bool": bool, "dict": dict, "list": list[str]}.get(name, str)
        case ast.Constant(value=None):
            kind = NoneType
        case ast.BinOp(left=left, right=right):
            kind = _plain_kind(left) | _plain_kind(right)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            kind = _plain_kind(inner) | None
        case ast.Subscript(value=ast.Name(id="dict")):
            kind = dict
        case ast.Subscript(value=ast.Name(id="list")):
            kind = list[str]
    return kind


def _written(node: yaml.Node, constructor: yaml.SafeLoader) -> Any:
    """A plain word as it is written, to be read by its setting's own type as behind a flag: 007 may be a name."""
    if isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] in ("int", "float", "bool"):
        return node.value
    return constructor.construct_object(node, deep=True)


def parser_of(kinds: Mapping[str, Any], groups: Sequence[type], *, command: str) -> argparse.ArgumentParser:
    """The flags of a command; help shows our own, and names the Trainer's."""
    parser = argparse.ArgumentParser(
        prog=f"atomtune {command}",
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if command == "train":
        parser.add_argument("yaml", nargs="?", metavar="run.yaml", help="the same settings as `name: value` lines")
    if command == "inspect":
        parser.add_argument("paths", nargs="*", metavar="DATA", help="the same as --dataset_path")
    for group in groups:
        section = parser.add_argument_group(str(group.__doc__))
        hints = typing.get_type_hints(group)
        for f in fields(group):
            info: Any = f.default
            section.add_argument(
                f"--{f.name}", help=_help_line(info), metavar=_metavar(hints[f.name]), **_takes(hints[f.name])
            )
    own = kinds_of(groups)
    others = [name for name in kinds if name not in own]
    for name in others:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS, **_takes(kinds[name]))
    if others:
        listed = textwrap.fill(", ".join(others), width=110, initial_indent="  ", subsequent_indent="  ")
        parser.epilog = f"Every setting of transformers.TrainingArguments passes too:\n{listed}"
    return parser


def _help_line(info: Any) -> str:
    default = info.default if info.default_factory is None else info.default_factory()
    shown = " ".join(default) if isinstance(default, list) else default
    known = "" if default is None or default is False or info.is_required() else f" [{shown}]"
    return f"{info.description}{known}".replace("%", "%%")


def _metavar(kind: Any) -> str | None:
    choices = [
        c
        for part in (kind, *typing.get_args(kind))
        if typing.get_origin(part) is Literal
        for c in typing.get_args(part)
    ]
    if choices:
        return "|".join(choices)
    return {int: "N", float: "X", bool: "true|false"}.get(kind, "…")


def _takes(kind: Any) -> dict[str, Any]:
    parts = {kind, *typing.get_args(kind)}  # of list[str] | None: itself, list[str] and None
    if bool in parts or "true" in parts:
        return {"nargs": "?", "const": "true"}
    return {"nargs": "+", "action": "extend"} if any(typing.get_origin(part) is list for part in parts) else {}
