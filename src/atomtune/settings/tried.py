"""Tried settings: the meaning of `--try name=a,b`, and which settings a sweep cannot try."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from atomtune.settings.command_settings import SweepChoices
from atomtune.settings.declare import is_secret
from atomtune.settings.flags import types_of
from atomtune.settings.run_settings import DataSettings

#: Settings that the sweep itself sets for its trials.
NOT_SHARED = ("output_dir", "resume")
#: Settings of the records that change neither the held-out records nor their tokens.
SAME_RECORDS = ("layout",)
#: Settings that a trial cannot have, and why.
NOT_IN_A_SWEEP = {
    **dict.fromkeys(("resume_from_checkpoint", "continue_training", "checkpoint"), "each trial starts from the base"),
    "max_minutes": "it would stop each trial before its end; --max_steps makes them shorter",
}
#: Settings that cannot be tried, and why: the sweep sets them, or trials could not be compared.
NOT_TRIED = {
    **NOT_IN_A_SWEEP,
    **dict.fromkeys(NOT_SHARED, "the sweep sets it for each trial"),
    **dict.fromkeys((*types_of((SweepChoices,)), "config"), "it is a setting of the sweep, not of its trials"),
    "model_path": "losses of two bases cannot be compared; make a sweep for each",
    "seed": "it also selects the held-out records; make a sweep for each seed",
    "data_seed": "it selects the held-out records; make a sweep for each",
    **dict.fromkeys(
        types_of((DataSettings,)).keys() - set(SAME_RECORDS),
        "it changes the records that are compared; make a sweep for each value",
    ),
}
RANGE = ":"
#: The words for a setting that is true or false.
_SWITCHES = {
    **dict.fromkeys(("true", "t", "yes", "y", "on"), 1.0),
    **dict.fromkeys(("false", "f", "no", "n", "off"), 0.0),
}


def as_words(value: Any) -> list[str]:
    """`{learning_rate: [1e-4, 3e-4]}`, from YAML or Python, as the words of the flag: `learning_rate=1e-4,3e-4`."""
    if isinstance(value, str) and value.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):  # otherwise a word, which is refused later
            value = json.loads(value)
    if not isinstance(value, Mapping):
        return [str(word) for word in value] if isinstance(value, list) else [str(value)]
    words = []
    for name, values in value.items():
        listed = values if isinstance(values, list) else [values]
        words.append(f"{name}={','.join(map(str, listed))}")
    return words


def values_tried(
    choices: SweepChoices, known: Callable[[str], str | None], problems: list[str]
) -> dict[str, tuple[str, ...]]:
    """setting → the values to try, in the order written, of settings that can be tried; problems go to `problems`.

    known  a name as written → its setting; None, after adding a problem, if it is unknown
    """
    tried: dict[str, tuple[str, ...]] = {}
    name: str | None = None
    for number, word in enumerate(choices.try_):  # name=1e-4,3e-4 arrives as two words, name=1e-4 and 3e-4
        written, equals, value = word.partition("=")
        if equals:
            name = known(written)
        elif number == 0:
            problems.append(f"--try {word!r}: expected NAME=A,B, for example --try learning_rate=1e-4,3e-4.")
            return {}
        if name is not None:
            values = tried.get(name, ())
            new = value if equals else word
            known_already = number_or_word(new) in map(number_or_word, values)
            tried[name] = values if known_already else (*values, new)
    for name, values in tried.items():
        problems += _misfits(name, values, trials=choices.trials)
    return {name: values for name, values in tried.items() if name not in NOT_TRIED}


def _misfits(name: str, values: tuple[str, ...], *, trials: int) -> Iterator[str]:
    if reason := NOT_TRIED.get(name):
        name = name.rstrip("_")  # try_
        yield f"--try {name}: {reason}."
        return
    ranges = [value for value in values if is_range(value)]
    if "" in values:
        yield f"--try {name}: a value is missing."
    if ranges and not trials:
        yield f"--try {name}={ranges[0]}: a range needs --trials N; without it, list the values: {name}=A,B."
    if ranges and len(values) > 1:
        yield f"--try {name}: expected one range or a list of values, not both."
    if ranges:
        low, high = ends_of(ranges[0])
        if low >= high:
            yield f"--try {name}={ranges[0]}: expected LOW{RANGE}HIGH, the lower number first."


def number_or_word(value: str) -> float | str:
    """The number that a value spells, so that `1e-4` and `0.0001` are one value; any other value as it is.

    A switch is 1 or 0, so that `true`, `True` and `yes` are one value too.
    """
    try:
        return float(value)
    except ValueError:
        return _SWITCHES.get(value.lower(), value)


def is_range(value: str) -> bool:
    """Whether a value is a range `LOW:HIGH` of two numbers."""
    try:
        ends_of(value)
    except ValueError:
        return False
    return True


def ends_of(value: str) -> tuple[float, float]:
    """The two numbers of a range. Raises ValueError for any other value."""
    low, _, high = value.partition(RANGE)
    return float(low), float(high)


def points_of(tried: Mapping[str, tuple[str, ...]]) -> list[dict[str, str]]:
    """Every combination of the values; a range is represented by its two ends."""
    values = [_ends_as_words(values) for values in tried.values()]
    return [dict(zip(tried, combination, strict=True)) for combination in itertools.product(*values)]


def _ends_as_words(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(values) == 1 and is_range(values[0]):
        low, _, high = values[0].partition(RANGE)
        return (low, high)
    return values


def _is_on(value: Any) -> bool:
    """Whether a setting, as it was written, does anything: it is not missing, false or 0."""
    word = str(value).lower()
    return word != "none" and number_or_word(word) != 0


def not_comparable(shared: Mapping[str, Any], tried: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Problems of shared settings that would make trials incomparable."""
    for name, reason in NOT_IN_A_SWEEP.items():
        if _is_on(shared.get(name)):
            yield f"--{name} in a sweep: {reason}. Leave it out."
    for name in filter(is_secret, shared):
        yield f"--{name} in a sweep: the file of every trial would hold it. Leave it out, and set HF_TOKEN."
    holds_none_out = str(shared.get("eval_size", "auto")).strip("0.") == "" and not shared.get("eval_path")
    never_evaluates = "no" in (str(shared.get("eval_strategy")).lower(), *tried.get("eval_strategy", ()))
    if holds_none_out or never_evaluates:
        yield (
            "a sweep compares trials by the loss of held-out records, and this one has none. Leave out "
            f"{'--eval_size 0' if holds_none_out else '--eval_strategy no'}."
        )
