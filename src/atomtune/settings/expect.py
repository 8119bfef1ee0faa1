"""Expect: the valid values of a setting in words, for --help and for messages."""

import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

from pydantic.fields import FieldInfo

from atomtune.language import message


def field_infos(groups: Sequence[type[Any]]) -> dict[str, FieldInfo]:
    """name → declaration, of every setting of these classes."""
    infos = {}
    for group in groups:
        for field in fields(group):
            assert isinstance(field.default, FieldInfo), f"{field.name} is declared by setting(…)"
            infos[field.name] = field.default
    return infos


def default_of(info: FieldInfo) -> Any:
    """A setting's default; None for a required one."""
    return None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})


def limits_of(info: FieldInfo) -> dict[str, float]:
    """The range of a number, by pydantic's names for limits, the lower one first: `{"ge": 1, "le": 8}`."""
    return {
        name: getattr(limit, name)
        for name in ("ge", "gt", "le", "lt")
        for limit in info.metadata
        if hasattr(limit, name)
    }


def members_of(kind: Any) -> tuple[Any, ...]:
    """The members of a union; of another type, the type itself."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def choices_in(kind: Any) -> tuple[str, ...]:
    """The words of a Literal, alone or in a union."""
    choices: tuple[str, ...] = ()
    for part in (kind, *typing.get_args(kind)):
        if typing.get_origin(part) is Literal:
            choices += typing.get_args(part)
    return choices


def expected(kind: Any, info: FieldInfo | None = None) -> str:
    """For example `a whole number, 1 or more`, or `one of shorten, skip, error`."""
    parts = _parts(kind)
    words = [_KINDS[part] for part in _KINDS if part in parts]
    if bool in parts and str in parts:  # for example --fsdp: the flag alone, or words
        words = ["true, false or text"]
    choices = choices_in(kind)
    if choices:
        words = [f"one of {', '.join(choices)}"]
    text = " or ".join(words)
    limits = limits_of(info) if info is not None else {}
    return f"{text}, {_RANGE_WORDS[tuple(limits)].format(*limits.values())}" if limits else text


#: In the order in which a message lists the members of a union.
_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: message("a number"),
    str: message("text"),
    list[float]: message("numbers"),
    list[str]: message("words"),
    dict: 'JSON, for example {"name": 1}',
}


def _parts(kind: Any) -> set[Any]:
    """The members of a union, with dict[str, bool] as dict, without None, and without list[str] if there is str."""
    parts = {dict if typing.get_origin(part) is dict else part for part in members_of(kind)}
    if str in parts:
        parts -= {list[str]}
    if dict in parts:  # dict or str: the str is the name of a file
        parts -= {str}
    return parts


#: One text per combination of limits, because Chinese cannot be composed from two parts as English can.
_RANGE_WORDS = {
    ("ge",): "{:,} or more",
    ("gt",): "more than {}",
    ("le",): "at most {:,}",
    ("lt",): "less than {}",
    ("ge", "le"): "at least {:,} and at most {:,}",
    ("ge", "lt"): "at least {:,} and less than {}",
    ("gt", "le"): "more than {} and at most {:,}",
    ("gt", "lt"): "more than {} and less than {}",
}
