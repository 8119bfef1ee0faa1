"""Formats: a file's first values → its Schema; one JSON value → one Record, or the reasons why not.

Before: files.py.  After: template.py.
Known here: alpaca (alpaca.py), ShareGPT, OpenAI's messages, prompt and completion, text (chats.py). Whatever the
format, equal conversations become equal Records (tests/data/test_mirrors.py).
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from atomtune.choices import FormatName
from atomtune.data.formats.alpaca import alpaca_record
from atomtune.data.formats.chat import messages_record, prompt_record, sharegpt_record, text_record
from atomtune.data.formats.fields import Reading, keys_of, kind, printable
from atomtune.data.formats.schema import RECORD_KEYS, ROLES, SIGNS, SPELLINGS, TURN_KEYS, Schema
from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import ParsedRecord, Record, Refusal, RefusalKind
from atomtune.errors import BadData, listing

__all__ = ["Schema", "detect_schema", "to_record"]

_READERS = {
    "alpaca": alpaca_record,
    "sharegpt": sharegpt_record,
    "messages": messages_record,
    "prompt": prompt_record,
    "text": text_record,
}
_EXPECTED = {**{name: " and ".join(keys) for name, keys in SIGNS.items()}, "alpaca": "instruction, input and output"}
_OURS = ("system", "user", "assistant", "tool")
_ALPACA = Schema()
_PREFERENCE = (
    "preference data (chosen, rejected), which this tool does not train on. To train on the chosen answers alone pass "
    "--keys chosen=completion beside a prompt, --keys chosen=output beside an instruction, or --keys chosen=messages "
    "where they are whole conversations"
)


def to_record(raw: RawRecord, schema: Schema = _ALPACA) -> ParsedRecord:
    """Read one value by its file's schema: a Record with notes on what is unusual in it, or the Refusal of it."""
    given, origin = raw
    if not isinstance(given, dict):
        reason = f"{kind(given)}; expected an object with {_EXPECTED[schema.name]}"
        return ParsedRecord(Refusal(origin, reason, RefusalKind.NO_RECORD))
    value = schema.rename_keys(given)
    reading = Reading(origin, schema)
    if value is not given:
        for theirs, ours in SPELLINGS.items():
            if theirs in given and theirs not in value:
                reading.notes.add(f'key "{theirs}" read as "{ours}"')
        for theirs, ours in schema.keys.items():
            if theirs in given and ours in given and ours not in schema.keys and ours in RECORD_KEYS:
                reading.notes.add(f'key "{ours}" is not used, "{printable(theirs)}" is read for it,')
    for key in SIGNS[schema.name]:
        if key not in value:
            if "chosen" in given and "rejected" in given:
                return ParsedRecord(Refusal(origin, _PREFERENCE, RefusalKind.NO_RECORD))
            reading.missing(key, given)
    outcome = _READERS[schema.name](value, reading)
    return ParsedRecord(outcome, tuple(reading.notes) if isinstance(outcome, Record) else ())


def detect_schema(
    values: Sequence[object],
    *,
    asked: str = "auto",
    keys: Mapping[str, str] = {},
    roles: Mapping[str, str] = {},
    name: str,
    first: str = "",
) -> Schema:
    """How the values of a file are read, told from the first of them; `name` is the file's, for messages.

    first  where the first of the values stands, "train.jsonl:1"

    Values that are no objects say nothing; where there is no other, it is alpaca, and each is refused in its place.
    Raises BadData where they fit two formats or none, or where keys or roles name what is not there.
    """
    records = [value for value in values if isinstance(value, dict)]
    problems = [*_wrong_names(records, keys, roles, name)]
    if problems:
        raise BadData(listing(problems))
    if asked != "auto":
        return Schema(cast(FormatName, asked), dict(keys), dict(roles))
    named = Schema("alpaca", dict(keys), dict(roles))
    renamed = [named.rename_keys(record) for record in records]
    fits = _fitting(renamed, filled=True) or _fitting(renamed, filled=False)
    if len(fits) > 1:
        which = " and ".join(f"{one} ({', '.join(SIGNS[one])})" for one in fits)
        raise BadData(f"{name} fits {which}: pass {' or '.join(f'--format {one}' for one in fits)}.")
    if records and not fits:
        raise BadData(_fits_none(records, renamed, first or name))
    return Schema(fits[0] if fits else "alpaca", named.keys, named.roles)


def _fitting(records: Sequence[Mapping[str, Any]], *, filled: bool) -> list[FormatName]:
    """The formats all of whose signs stand in some record; `filled`, with a value there."""

    def is_sign(record: Mapping[str, Any], key: str) -> bool:
        return key in record and not (filled and record[key] in (None, "", []))

    return [
        format for format, signs in SIGNS.items() if any(all(is_sign(one, key) for key in signs) for one in records)
    ]


def _fits_none(records: Sequence[dict[str, Any]], renamed: Sequence[dict[str, Any]], name: str) -> str:
    there = dict.fromkeys(key for record in records for key in record)
    if "chosen" in there and "rejected" in there:
        return f"{name} is {_PREFERENCE}."
    ours = {key for record in renamed for key in record}
    near = {
        sign: found[0]
        for signs in SIGNS.values()
        for sign in signs
        if sign not in ours and (found := difflib.get_close_matches(sign, map(str, there), n=1))
    }

    def closeness(format: FormatName) -> float:
        return sum(1.0 if sign in ours else 0.9 if sign in near else 0.0 for sign in SIGNS[format]) / len(SIGNS[format])

    nearest = max(SIGNS, key=closeness)
    missing = [sign for sign in SIGNS[nearest] if sign not in ours]
    lines = [f'no key "{sign}"; keys here: {keys_of(there)}' for sign in missing]
    known = ", ".join(f"{format} ({', '.join(signs)})" for format, signs in SIGNS.items())
    mapped = ",".join(f"{printable(near.get(sign, 'YOURS'))}={sign}" for sign in missing)
    return (
        f"{name} fits no format; the nearest is {nearest}: {'; '.join(lines)}.\n"
        f"Known: {known}.\nRename the keys, or pass --keys {mapped}."
    )


def _wrong_names(
    records: Sequence[dict[str, Any]], keys: Mapping[str, str], roles: Mapping[str, str], name: str
) -> list[str]:
    """What is wrong with the user's names for keys and roles."""
    problems = []
    known = RECORD_KEYS | TURN_KEYS
    for theirs, ours in keys.items():
        if ours not in known:
            near = difflib.get_close_matches(ours, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(sorted(known))}."
            problems.append(f'--keys {theirs}={ours}: there is no key "{ours}"{hint}')
        elif list(keys.values()).count(ours) > 1:
            problems.append(f"--keys {theirs}={ours}: another key is {ours} already.")
        elif (objects := _objects(records, ours)) and not any(theirs in one for one in objects):
            here = dict.fromkeys(key for one in objects for key in one)
            problems.append(
                f'{name}: --keys {theirs}={ours}: no key "{theirs}" in the first {len(records):,} records; '
                f"keys here: {keys_of(here)}."
            )
    for theirs, ours in roles.items():
        if ours not in ROLES:
            problems.append(f"--roles {theirs}={ours}: expected {', '.join(_OURS[:-1])} or {_OURS[-1]}.")
    return problems


def _objects(records: Sequence[dict[str, Any]], ours: str) -> list[dict[str, Any]]:
    """Where a key may stand that is to become one of ours: the records, or the turns in their lists."""
    if ours in RECORD_KEYS:
        return list(records)
    lists = [one for record in records for one in record.values() if isinstance(one, list)]
    return [turn for one in lists for turn in one if isinstance(turn, dict)]
