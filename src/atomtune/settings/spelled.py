"""Spelled: settings written as a command line again, for another command with the same settings."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from atomtune.settings.expect import default_of
from atomtune.settings.run_settings import TokenizerSettings


def words_of(settings: Any, *groups: type[Any], also: Sequence[str] = ()) -> list[str]:
    """Flags for the settings of these groups that differ from their defaults, with their values.

    groups  settings classes that `settings` inherits from, for example RecordSettings
    also    further settings, which no group declares
    """
    words = []
    for name in dict.fromkeys([*(field.name for group in groups for field in fields(group)), *also]):
        value = getattr(settings, name)
        if value == default_of(type(settings).__pydantic_fields__[name]):
            continue
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def base_words(settings: Any, group: type[Any] = TokenizerSettings) -> list[str]:
    """Flags with which another command uses the same base.

    group  what both commands have in common: ModelSettings if the other one loads the base in the same way
    """
    words = words_of(settings, group)
    return [*words, "--other_base"] if settings.other_base else words
