"""Library settings: all settings of transformers.TrainingArguments, read from its source text.

Importing it would import torch, which takes seconds; --help and messages about a wrong flag work without that.
"""

import ast
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import Any

#: The library's enumerations, and the modules that define them.
_ENUMERATIONS = {
    "SchedulerType": "trainer_utils",
    "IntervalStrategy": "trainer_utils",
    "SaveStrategy": "trainer_utils",
    "HubStrategy": "trainer_utils",
    "OptimizerNames": "training_args",
}
#: Log levels, which the library reads from a table in another module.
_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")


@dataclass(frozen=True)
class LibrarySetting:
    """A setting of the Trainer, as declared in its source."""

    type: Any
    default: Any  # None also if the source computes it
    help: str
    enumeration: str | None  # name of an enumeration, for example SchedulerType; choices_of has its values
    choices: tuple[str, ...] = ()  # valid values of a text setting without an enumeration


@cache
def library_settings() -> dict[str, LibrarySetting]:
    """name → setting, in the library's order."""
    settings = {}
    for node in _class_body("training_args", "TrainingArguments"):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
            settings[node.target.id] = _setting(node)
    return settings


def library_types() -> dict[str, Any]:
    """name → type."""
    return {name: setting.type for name, setting in library_settings().items()}


def choices_of(setting: LibrarySetting) -> tuple[str, ...]:
    """The valid values of a setting; empty if they are not listed."""
    if setting.enumeration is None:
        return setting.choices
    lines = _class_body(_ENUMERATIONS[setting.enumeration], setting.enumeration)
    values = [line.value for line in lines if isinstance(line, ast.Assign)]
    return tuple(str(value.value) for value in values if isinstance(value, ast.Constant))


def _setting(node: ast.AnnAssign) -> LibrarySetting:
    call = node.value
    arguments = {keyword.arg: keyword.value for keyword in call.keywords} if isinstance(call, ast.Call) else {}
    metadata = _literal(arguments.get("metadata"), {})
    kind, name = _type_of(node.annotation), getattr(node.target, "id", "")
    if metadata.get("const") is True:  # for example --fsdp, where the flag alone means True
        kind = bool | kind
    return LibrarySetting(
        type=kind,
        default=_literal(arguments.get("default"), None),
        help=_plain(str(metadata.get("help", ""))),
        enumeration=_enumeration(node.annotation),
        choices=_LEVELS if name in ("log_level", "log_level_replica") else tuple(metadata.get("choices", ())),
    )


def _literal(node: ast.expr | None, otherwise: Any) -> Any:
    """The value of a constant expression; `otherwise` if there is none or it is not constant."""
    try:
        return ast.literal_eval(node) if node is not None else otherwise
    except ValueError:
        return otherwise


def _plain(text: str) -> str:
    """A help text on one line, without a final full stop and without the markup of web pages."""
    text = re.sub(r"\[([^\]]+)\]\(http[^)]+\)", r"\1", " ".join(text.split()))
    return text.replace("`", "").replace("%%", "%").rstrip(".")


def _type_of(node: ast.expr) -> Any:
    """An annotation as a plain type; the library's own classes become str."""
    kind: Any = str
    match node:
        case ast.Name(id=name):
            kind = {"int": int, "float": float, "bool": bool, "dict": dict, "list": list[str]}.get(name, str)
        case ast.Constant(value=None):
            kind = NoneType
        case ast.BinOp(left=left, right=right):
            kind = _type_of(left) | _type_of(right)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            kind = _type_of(inner) | None
        case ast.Subscript(value=ast.Name(id="dict")):
            kind = dict
        case ast.Subscript(value=ast.Name(id="list")):
            kind = list[str]
    return kind


def _enumeration(annotation: ast.expr) -> str | None:
    """`SchedulerType` for `SchedulerType | str`."""
    names = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    return next((name for name in names if name in _ENUMERATIONS), None)


@cache
def _body(module: str) -> list[ast.stmt]:
    package = find_spec("transformers")
    assert package is not None and package.origin is not None, "transformers is a dependency"
    return ast.parse(Path(package.origin).with_name(f"{module}.py").read_text(encoding="utf-8")).body


def _class_body(module: str, name: str) -> list[ast.stmt]:
    classes = [node for node in _body(module) if isinstance(node, ast.ClassDef)]
    return next(node.body for node in classes if node.name == name)
