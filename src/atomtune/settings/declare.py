"""Declare: how a setting is declared, once for its flag, YAML key, help line, default and range.

A setting with the same meaning in several commands is made by one function. Where a name means different things, for
example `json` or `adapter_path`, each class declares it. A class's docstring is the heading over its settings in
`--help`.
"""

from typing import Any

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)

#: In tokens; no model has more positions.
LONGEST_ANSWER = 10_000_000
#: The largest seed of numpy's generators.
LARGEST_SEED = 2**32 - 1


def setting(
    default: Any,
    text: str,
    *,
    value: str | None = None,
    unit: str | None = None,
    rare: bool = False,
    at_least: float | None = None,
    more_than: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a field of a settings class.

    text: the help line: what it does, and in which unit.
    value: the placeholder in --help, for example FILE or N.
    unit: of a number, for programs; the help line has it in words.
    rare: shown only by `--help all`.
    """
    is_list = isinstance(default, list)
    return Field(
        **{"default_factory": lambda: list(default)} if is_list else {"default": default},
        description=text,
        ge=at_least,
        gt=more_than,
        le=at_most,
        lt=below,
        json_schema_extra={"value": value, "unit": unit, "rare": rare},
    )


def other_base_setting(*, rare: bool = False) -> Any:
    """Accept a base with other weights than the adapter was trained on, for all commands that load an adapter."""
    text = "accept a base model whose weights are not those that the adapter was trained on"
    return setting(False, text, rare=rare)


def seed_setting(text: str, *, default: int = 42, rare: bool = False) -> Any:
    """A seed, for what the text says."""
    return setting(default, text, at_least=0, at_most=LARGEST_SEED, rare=rare)


def answer_setting(default: int, text: str) -> Any:
    """The longest answer, in tokens."""
    return setting(default, text, at_least=1, at_most=LONGEST_ANSWER, unit="tokens")


def keys_setting() -> Any:
    """Other names for the keys of records."""
    text = "rename keys of your records, for example question=instruction answer=output"
    return setting([], text, value="THEIRS=OURS", rare=True)


def roles_setting() -> Any:
    """Other names for the roles of conversations."""
    text = "rename roles of your conversations, for example bot=assistant"
    return setting([], text, value="THEIRS=OURS", rare=True)


def is_secret(name: str) -> bool:
    """Whether a setting's value must never be written to a file or printed."""
    return name.endswith(("_token", "_key", "_secret", "_password"))
