"""Spelled: settings written as a command line again, for another command with the same settings."""

from dataclasses import fields
from typing import Any

from atomtune.settings.expect import default_of
from atomtune.settings.run_settings import TokenizerSettings


def words_of(settings: Any, *groups: type[Any]) -> list[str]:
    """Flags for the settings of these groups that differ from their defaults, with their values.

    groups  settings classes that `settings` inherits from, for example RecordSettings
    """
    words = []
    for name in dict.fromkeys(field.name for group in groups for field in fields(group)):
        value = getattr(settings, name)
        if value == default_of(type(settings).__pydantic_fields__[name]):
            continue
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def base_words(settings: Any) -> list[str]:
    """Flags with which another command uses the same base."""
    words = words_of(settings, TokenizerSettings)
    return [*words, "--other_base"] if settings.other_base else words
