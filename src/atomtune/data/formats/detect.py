"""Formats: detect a file's Schema from its first values, then read each JSON value as a Record or refuse it.

The formats are alpaca, ShareGPT, OpenAI's messages, prompt and completion, and text. Equal conversations become equal
Records in every format (tests/walk/test_mirrors.py).
"""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from shlex import quote
from typing import Any

from atomtune.choices import FormatChoice, FormatName
from atomtune.data.formats import exports, media, preference
from atomtune.data.formats.alpaca import read_alpaca
from atomtune.data.formats.chat import read_messages, read_prompt, read_rendered, read_sharegpt
from atomtune.data.formats.conversation import Conversation, as_parsed
from atomtune.data.formats.fields import Field, is_empty, keys_of, kind, missing_key
from atomtune.data.formats.schema import RECORD_KEYS, ROLES, SIGNS, SPELLINGS, TURN_KEYS, Schema
from atomtune.data.reading.raw import RawRecord, printable
from atomtune.data.records import ParsedRecord, Refusal, RefusalKind
from atomtune.errors import BadData, listing

__all__ = ["Schema", "detect_schema", "to_record"]

Json = dict[str, Any]
_READERS: dict[FormatName, Callable[[Json, Schema], Field[Conversation]]] = {
    "alpaca": read_alpaca,
    "sharegpt": read_sharegpt,
    "messages": read_messages,
    "prompt": read_prompt,
    "text": read_rendered,
}
_EXPECTED = {
    **{name: " and ".join(keys) for name, keys in SIGNS.items()},
    "alpaca": "instruction, input and output",
    "prompt": "prompt and completion",
}
_ALPACA = Schema()
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
    "reasoning_content": ("complex_cot", "cot", "thoughts", "thought", "think", "思考"),
}
#: Keys of SIGNS whose value is a list.
_LISTS = ("conversations", "messages")
#: Minimum similarity, as difflib measures it, for a misspelled key.
_LIKE = 0.75
_PAIR_ALONE = (
    "preference data (chosen, rejected) without a prompt. The chosen answers are learned if the record also has an "
    "instruction, a prompt, messages or conversations, or if chosen is a list of messages"
)


def to_record(raw: RawRecord, schema: Schema = _ALPACA) -> ParsedRecord:
    """Read one value by its file's schema: a Record with notes on anything unusual, or a Refusal with all problems."""
    value, origin = raw
    if not isinstance(value, dict):
        reason = f"{kind(value)}; expected an object with {_EXPECTED[schema.name]}"
        return ParsedRecord(Refusal(origin, reason, RefusalKind.NO_RECORD))
    exported, notes = exports.as_messages(value)
    renamed = schema.rename_keys(exported)
    if renamed is not exported:
        notes = (*notes, *_notes_on_renaming(exported, renamed, schema))
    record, problems, notes_on_pairs = preference.read_preference(renamed, schema)
    missing = [key for key in SIGNS[schema.name] if key not in record]
    if missing and "chosen" in value and "rejected" in value:
        return ParsedRecord(Refusal(origin, _PAIR_ALONE, RefusalKind.NO_RECORD))
    conversation = _READERS[schema.name](record, schema)
    problems = (
        *problems,
        *[missing_key(key, value) for key in missing],
        *conversation.problems,
        *media.problems_of_media(record, conversation.value.turns),
    )
    notes = (*notes, *notes_on_pairs, *conversation.notes)
    return as_parsed(Field(conversation.value, problems, notes), origin)


def _notes_on_renaming(value: Json, record: Json, schema: Schema) -> tuple[str, ...]:
    notes = []
    for theirs, ours in SPELLINGS.items():
        if theirs in value and theirs not in record:
            notes.append(f'key "{theirs}" is read as "{ours}"')
    for theirs, ours in schema.keys.items():
        both_there = theirs in value and ours in value
        if both_there and ours not in schema.keys and ours in RECORD_KEYS:
            notes.append(f'key "{ours}" is not used, "{printable(theirs)}" is read instead')
    return tuple(notes)


def detect_schema(
    values: Sequence[object],
    *,
    format_choice: FormatChoice = "auto",
    keys: Mapping[str, str] = {},
    roles: Mapping[str, str] = {},
    name: str,
    first: str = "",
) -> Schema:
    """Detect how the values of a file are read.

    values  the first values of the file
    keys    the file's key → ours, as the user gave them
    roles   the file's role → ours, as the user gave them
    name    of the file, in messages
    first   origin of the first value, "train.jsonl:1"
    Values that are not objects are ignored. If there are no others, the format is alpaca, so that each is refused with
    its own origin.
    Raises BadData if the values fit several formats or none, or if `keys` or `roles` have unknown names.
    """
    records = [value for value in values if isinstance(value, dict)]
    problems = [*_problems_of_keys(records, keys, name), *_problems_of_roles(roles)]
    if problems:
        raise BadData(listing(problems))
    schema = Schema("alpaca", dict(keys), dict(roles))
    renamed = [schema.rename_keys(exports.as_messages(record)[0]) for record in records]
    format_name: FormatName = "alpaca"
    if format_choice != "auto":
        format_name = format_choice
    elif records:
        plain = [preference.read_preference(record, schema).value for record in renamed]
        format_name = _format_of(records, plain, name, first)
    return Schema(format_name, schema.keys, schema.roles, preference.labels_are_classes(renamed))


def _format_of(records: Sequence[Json], plain: Sequence[Json], name: str, first: str) -> FormatName:
    """The one format that the records fit. Raises BadData if they fit several or none.

    plain  the same records under our keys, with preference data converted
    """
    # A table has every column in every row, so keys without a value count only if no format fits otherwise.
    fits = _fitting(plain, filled=True) or _fitting(plain, filled=False)
    beside_text: list[FormatName] = [fit for fit in fits if fit != "text"]
    if "text" in fits and beside_text and _text_renders_the_rest(plain, beside_text):
        fits = beside_text
    if not fits:
        raise BadData(_fits_none(records, plain, first or name))
    if len(fits) > 1:
        signs = " and ".join(f"{fit} ({', '.join(SIGNS[fit])})" for fit in fits)
        flags = " or ".join(f"--format {fit}" for fit in fits)
        raise BadData(f"{name} fits {signs}: pass {flags}.")
    return fits[0]


def _fitting(records: Sequence[Json], *, filled: bool) -> list[FormatName]:
    """The formats whose keys all occur in some record; if `filled`, with a value that is not empty."""
    fits = []
    for name, signs in SIGNS.items():
        if any(_has_signs(record, signs, filled=filled) for record in records):
            fits.append(name)
    return fits


def _has_signs(record: Json, signs: Iterable[str], *, filled: bool) -> bool:
    return all(key in record and not (filled and is_empty(record[key])) for key in signs)


def _text_renders_the_rest(records: Sequence[Json], others: Sequence[FormatName]) -> bool:
    """Whether `text` only repeats the other keys, rendered by a template.

    Stanford Alpaca is published that way: instruction, input, output, and all of it rendered in `text`.
    """
    answer_keys = [key for name in others for key in ("output", "completion") if key in SIGNS[name]]
    with_text = [record for record in records if not is_empty(record.get("text"))]
    if not answer_keys or not with_text:
        return False
    return all(_text_holds_answers(record, answer_keys) for record in with_text)


def _text_holds_answers(record: Json, answer_keys: Sequence[str]) -> bool:
    rendered = record["text"]
    answers = [record[key] for key in answer_keys if isinstance(record.get(key), str)]
    if not answers or not isinstance(rendered, str):
        return False
    return all(answer.strip() in rendered for answer in answers)


def _fits_none(records: Sequence[Json], plain: Sequence[Json], name: str) -> str:
    """The error for records that fit no format: the closest one, its missing keys, and the --keys that would fit."""
    their_keys = _all_keys(records)
    if "chosen" in their_keys and "rejected" in their_keys:
        return f"{name} is {_PAIR_ALONE}."
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
    optional: tuple[str, ...] = ()  # their content would be lost if they are not mapped too
    if nearest == "alpaca":
        optional = ("input", "reasoning_content")
    elif nearest == "prompt":
        optional = ("reasoning_content",)
    taken = [theirs for theirs, _ in renamed]
    renamed += [(likely[key], key) for key in optional if key in likely and likely[key] not in taken]
    return quote(",".join(f"{printable(theirs)}={ours}" for theirs, ours in renamed))


def _key_of_records(value: Json) -> str | None:
    """The key of a list of objects, in a value that may be the whole file as one object; None if there is none."""
    for key, inner in value.items():
        if isinstance(inner, list) and inner and all(isinstance(item, dict) for item in inner):
            return key
    return None


def _all_keys(records: Iterable[Json]) -> dict[str, None]:
    """The keys of all records, in order of appearance; a dict, as a set has no order."""
    return dict.fromkeys(key for record in records for key in record)


def _likely_keys(records: Sequence[Json], our_keys: Mapping[str, None]) -> dict[str, str]:
    """Each of our keys that no record has → the file's key that probably means it; one key only once per format."""
    texts = _keys_of_values(records, str)
    lists = _keys_of_values(records, list)
    likely: dict[str, str] = {}
    for sign in [*dict.fromkeys(sign for signs in SIGNS.values() for sign in signs), "input", "reasoning_content"]:
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


def _problems_of_keys(records: Sequence[Json], keys: Mapping[str, str], name: str) -> list[str]:
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


def _problems_of_roles(roles: Mapping[str, str]) -> list[str]:
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
