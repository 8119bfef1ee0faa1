"""Help as JSON: commands, settings and exit codes for programs, from the same declarations as --help."""

import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.fields import FieldInfo

from atomtune import __version__
from atomtune.errors import EXIT_CODE_MEANINGS
from atomtune.settings.expect import default_of, expected, field_infos, limits_of, members_of
from atomtune.settings.flags import OF_A_RUN, PATHS_ARE, arity, flag_of
from atomtune.settings.help import ABOUT, EXAMPLES, USAGE, choices_of_setting, extra_of, heading_of, meaning_of
from atomtune.settings.library import library_settings

#: pydantic's name of a limit → its key in the JSON.
_LIMITS = {"ge": "at_least", "gt": "more_than", "le": "at_most", "lt": "below"}
LIBRARY = "transformers.Trainer"


def overview_values(summaries: Mapping[str, str], groups: Mapping[str, Sequence[type[Any]]]) -> dict[str, Any]:
    """All commands. summaries: command → its line in the overview."""
    commands = {command: command_values(command, summary, groups[command]) for command, summary in summaries.items()}
    for values in commands.values():
        del values["exit_codes"]
    return {"atomtune": __version__, "commands": commands, "exit_codes": exit_codes()}


def command_values(command: str, summary: str, groups: Sequence[type[Any]]) -> dict[str, Any]:
    """One command.

    words  the setting to which words without a flag belong; for commands of a run, a YAML file of settings
    """
    settings = [values for group in groups for values in _own_settings(command, group)]
    if command in OF_A_RUN:
        settings += _library_settings(field_infos(groups))
    return {
        "command": command,
        "summary": " ".join(filter(None, (summary, ABOUT.get(command)))),
        "usage": f"atomtune {command} {USAGE[command]}",
        "words": "run.yaml" if command in OF_A_RUN else PATHS_ARE.get(command),
        "examples": [f"atomtune {command} {example}" for example in EXAMPLES[command]],
        "settings": settings,
        "exit_codes": exit_codes(),
    }


def exit_codes() -> dict[str, str]:
    return {str(int(code)): meaning for code, meaning in EXIT_CODE_MEANINGS.items()}


def _own_settings(command: str, group: type[Any]) -> list[dict[str, Any]]:
    types = typing.get_type_hints(group)
    return [_own_setting(command, group, name, types[name], info) for name, info in field_infos([group]).items()]


def _own_setting(command: str, group: type[Any], name: str, kind: Any, info: FieldInfo) -> dict[str, Any]:
    return {
        **_shape(name, kind),
        "unit": extra_of(info, "unit"),
        "range": {_LIMITS[name]: limit for name, limit in limits_of(info).items()},
        "expected": expected(kind, info),
        "default": default_of(info),
        "required": info.is_required(),
        "help": meaning_of(command, name, info),
        "section": heading_of(group, name),
        "rare": bool(extra_of(info, "rare")),
    }


def _library_settings(own: Mapping[str, FieldInfo]) -> list[dict[str, Any]]:
    """The Trainer's settings that are not declared by atomtune."""
    settings = []
    for name, setting in library_settings().items():
        if name not in own:
            settings.append(
                {
                    **_shape(name, setting.type),
                    "unit": None,
                    "range": {},
                    "expected": expected(setting.type),
                    "default": setting.default,
                    "required": False,
                    "help": setting.help,
                    "section": LIBRARY,
                    "rare": True,
                }
            )
    return settings


def _shape(name: str, kind: Any) -> dict[str, Any]:
    """Name, flag, type and choices of a setting, and how many words its flag takes."""
    words = arity(kind).get("nargs", 1)
    return {
        "name": name,
        "flag": flag_of(name),
        "type": _type_name(kind),
        "words": {"?": "0 or 1", "+": "1 or more"}.get(words, "1"),
        "choices": list(choices_of_setting(name, kind)),
    }


def _type_name(kind: Any) -> str:
    """`int`, `float`, `bool`, `text`, `object` or `list`; members of a union are joined by `|`, without None."""
    names = []
    for part in members_of(kind):
        if part is not type(None):
            names.append(_TYPE_NAMES.get(part) or _TYPE_NAMES.get(typing.get_origin(part), "text"))
    return "|".join(dict.fromkeys(names))


_TYPE_NAMES: dict[Any, str] = {bool: "bool", int: "int", float: "float", str: "text", dict: "object", list: "list"}
