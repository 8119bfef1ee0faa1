"""Key mapping: the user's --keys and --roles: checked against a file, and suggested for a file that fits no format."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from shlex import quote
from typing import Any

from atomtune.choices import FormatName
from atomtune.data.formats.fields import keys_of
from atomtune.data.formats.preference import PAIR_ALONE
from atomtune.data.formats.schema import RECORD_KEYS, ROLES, SIGNS, TURN_KEYS
from atomtune.data.reading.raw import printable

Json = dict[str, Any]
_OUR_ROLES = "system, user, assistant, tool or function_call"
#: Keys in published data sets, in lower case, for each of our keys, most likely first. Similar spelling alone would
#: mislead: "context" is similar to "text".
_ANSWERS = ("response", "answer", "target", "targets", "outputs", "completion", "solution", "reply", "summary")
_ANSWERS_TOO = ("assistant", "bot", "gpt", "content", "回答", "答案", "输出", "回复", "客服", "助手")
_QUESTIONS = ("question", "query", "problem", "prompt", "instruction", "input", "inputs")
_QUESTIONS_TOO = ("user", "human", "content", "问题", "提问", "指令", "输入", "用户", "顾客", "客户")
_SYNONYMS = {
    "output": (*_ANSWERS, *_ANSWERS_TOO),
    "completion": (*_ANSWERS, "output", *_ANSWERS_TOO),
    "conversations": ("dialogue", "dialog", "turns", "conversation", "data", "items"),
    "messages": ("chat",),
    "instruction": (*_QUESTIONS, *_QUESTIONS_TOO),
    "prompt": (*_QUESTIONS, *_QUESTIONS_TOO),
    "input": ("context",),
    "system": ("system_prompt", "system_message"),
    "reasoning_content": ("complex_cot", "cot", "thoughts", "thought", "think", "思考"),
}
#: Keys beside those of SIGNS that are suggested too, because the format would leave their content out.
_OPTIONAL: dict[FormatName, tuple[str, ...]] = {
    "alpaca": ("input", "system", "reasoning_content"),
    "prompt": ("system", "reasoning_content"),
    "sharegpt": ("system",),
    "messages": ("system",),
    "text": (),
}
#: Keys of SIGNS whose value is a list.
_LISTS = ("conversations", "messages")
#: Minimum similarity, as difflib measures it, for a misspelled key.
_LIKE = 0.75


def problems_of_keys(records: Sequence[Json], keys: Mapping[str, str], name: str) -> list[str]:
    """Problems with the user's --keys."""
    problems = []
    known = RECORD_KEYS | TURN_KEYS
    targets = list(keys.values())
    for theirs, ours in keys.items():
        shown = f"--keys {printable(theirs)}={printable(ours)}"
        objects = _objects(records, ours)
        if ours not in known:
            near = difflib.get_close_matches(ours, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(sorted(known))}."
            problems.append(f'{shown}: there is no key "{printable(ours)}"{hint}')
        elif targets.count(ours) > 1:
            problems.append(f"{shown}: {ours} is already taken by another key.")
        elif objects and not any(theirs in record for record in objects):
            problems.append(
                f'{name}: {shown}: no key "{printable(theirs)}" in the first {len(records):,} records; '
                f"keys here: {keys_of(_all_keys(objects))}."
            )
    return problems


def problems_of_roles(roles: Mapping[str, str]) -> list[str]:
    """Problems with the user's --roles."""
    return [
        f"--roles {printable(theirs)}={printable(ours)}: expected {_OUR_ROLES}."
        for theirs, ours in roles.items()
        if ours not in ROLES
    ]


def _objects(records: Sequence[Json], ours: str) -> list[Json]:
    """The objects in which a key that is mapped to `ours` may occur: the records, the turns in their lists, or both."""
    objects = list(records) if ours in RECORD_KEYS else []
    if ours not in TURN_KEYS:
        return objects
    for record in records:
        for value in record.values():
            if isinstance(value, list):
                objects += [turn for turn in value if isinstance(turn, dict)]
    return objects


def fits_none(records: Sequence[Json], plain: Sequence[Json], name: str) -> str:
    """The error for records that fit no format: the closest one, its missing keys, and the --keys that would fit."""
    their_keys = _all_keys(records)
    if "chosen" in their_keys and "rejected" in their_keys:
        return f"{name} is {PAIR_ALONE}."
    our_keys = _all_keys(plain)
    likely = _likely_keys(records, our_keys)
    nearest = max(SIGNS, key=lambda format_name: _closeness(format_name, our_keys, likely))
    missing = [sign for sign in SIGNS[nearest] if sign not in our_keys]
    lacks = "; ".join(f'no key "{sign}"; keys here: {keys_of(their_keys)}' for sign in missing)
    known = ", ".join(f"{format_name} ({', '.join(signs)})" for format_name, signs in SIGNS.items())
    flag = _keys_flag(nearest, missing, likely)
    remedy = f"Rename the keys, or pass --keys {flag}."
    if len(records) == 1 and (key := _key_of_records(records[0])) is not None:
        # In a program of jq, a key is a JSON text. ASCII escapes keep one readable that cannot be printed.
        program = quote(f".[{json.dumps(key, ensure_ascii=not key.isprintable())}][]")
        remedy = f'Its records seem to be in the list under "{printable(key)}": jq -c {program} OLD > NEW.jsonl'
    return f"{name} fits no format; the closest is {nearest}: {lacks}.\nKnown: {known}.\n{remedy}"


def _keys_flag(nearest: FormatName, missing: Sequence[str], likely: Mapping[str, str]) -> str:
    """The value of --keys with which a file would fit the nearest format: `question=instruction,answer=output`.

    missing  keys of that format which the file lacks
    likely   our key → the file's key that probably means it
    """
    renamed = [(likely.get(sign, "YOURS"), sign) for sign in missing]
    taken = [theirs for theirs, _ in renamed]
    renamed += [(likely[key], key) for key in _OPTIONAL[nearest] if key in likely and likely[key] not in taken]
    return quote(",".join(f"{printable(theirs)}={ours}" for theirs, ours in renamed))


def _key_of_records(value: Json) -> str | None:
    """The key of a list of records, in a value that may be the whole file as one object; None if there is none."""
    for key, inner in value.items():
        if isinstance(inner, list) and inner and all(isinstance(item, dict) and not _is_turn(item) for item in inner):
            return key
    return None


def _is_turn(value: Json) -> bool:
    return "role" in value or "from" in value


def _all_keys(records: Iterable[Json]) -> dict[str, None]:
    """The keys of all records, in order of appearance; a dict, as a set has no order."""
    return dict.fromkeys(key for record in records for key in record)


def _likely_keys(records: Sequence[Json], our_keys: Mapping[str, None]) -> dict[str, str]:
    """Each of our keys that no record has → the file's key that probably means it; one key only once per format."""
    texts = _keys_of_values(records, str)
    lists = _keys_of_values(records, list)
    likely: dict[str, str] = {}
    for sign in dict.fromkeys(chain(*SIGNS.values(), *_OPTIONAL.values())):
        their_keys = lists if sign in _LISTS else texts
        likely_key = None if sign in our_keys else _likely_key(sign, their_keys)
        if likely_key is not None:
            likely[sign] = likely_key
    for asks, tells in (("instruction", "output"), ("prompt", "completion")):
        if asks in likely and likely[asks] == likely.get(tells):
            del likely[asks]
    return likely


def _keys_of_values(records: Iterable[Json], kind_of_value: type) -> dict[str, None]:
    """The keys that have a value of this type in some record, in order of appearance."""
    return dict.fromkeys(key for record in records for key, value in record.items() if isinstance(value, kind_of_value))


def _closeness(name: FormatName, our_keys: Mapping[str, None], likely: Mapping[str, str]) -> float:
    """The share of a format's keys that are present; a key that another one probably means counts 0.9."""
    points = 0.0
    for sign in SIGNS[name]:
        if sign in our_keys:
            points += 1.0
        elif sign in likely:
            points += 0.9
    reads_history = name == "alpaca" and "history" in our_keys
    return points / len(SIGNS[name]) + reads_history


def _likely_key(sign: str, their_keys: Mapping[str, None]) -> str | None:
    """The file's key that probably means ours: a synonym, or a similar spelling; None if there is none."""
    by_word = {key.lower(): key for key in their_keys}
    for synonym in (sign, *_SYNONYMS.get(sign, ())):
        if synonym in by_word:
            return by_word[synonym]
    # Only the first 200 keys: comparing spellings is slow.
    near = difflib.get_close_matches(sign, map(str, islice(their_keys, 200)), n=1, cutoff=_LIKE)
    return near[0] if near else None
