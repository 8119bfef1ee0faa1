"""Settings spelled as the words of a command line again, for another command that takes the same ones."""

from dataclasses import fields
from typing import Any

from atomtune.settings.fields import TokenizerSettings


def words_of(settings: Any, *groups: type[Any]) -> list[str]:
    """The flags that set what of these groups differs from its default, each with its values.

    groups  settings classes that `settings` inherits from, as RecordSettings
    """
    words = []
    for name in dict.fromkeys(field.name for group in groups for field in fields(group)):
        default = type(settings).__pydantic_fields__[name].get_default(call_default_factory=True, validated_data={})
        value = getattr(settings, name)
        if value == default:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def base_words(settings: Any) -> list[str]:
    """The flags by which another command takes the base that this one took."""
    words = words_of(settings, TokenizerSettings)
    return [*words, "--other_base"] if settings.other_base else words
