"""Formats: detect a file's Schema from its first values, then read each JSON value as a Record or refuse it.

The formats are alpaca, ShareGPT, OpenAI's messages, prompt and completion, and text. Equal conversations become equal
Records in every format (tests/walk/test_mirrors.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from atomtune.choices import FormatChoice, FormatName
from atomtune.data.formats import exports, media, preference
from atomtune.data.formats.alpaca import read_alpaca
from atomtune.data.formats.chat import read_messages, read_prompt, read_rendered, read_sharegpt
from atomtune.data.formats.conversation import Conversation, as_parsed
from atomtune.data.formats.fields import Field, is_empty, kind, missing_key
from atomtune.data.formats.key_mapping import fits_none, problems_of_keys, problems_of_roles
from atomtune.data.formats.schema import RECORD_KEYS, SIGNS, SPELLINGS, Schema
from atomtune.data.reading.raw import RawRecord, printable
from atomtune.data.records import ParsedRecord, Refusal, RefusalKind
from atomtune.errors import BadData, listing

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
        return ParsedRecord(Refusal(origin, preference.PAIR_ALONE, RefusalKind.NO_RECORD))
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
    problems = [*problems_of_keys(records, keys, name), *problems_of_roles(roles)]
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
    return Schema(format_name, schema.keys, schema.roles, preference.labels_are_classes(renamed, format_name))


def _format_of(records: Sequence[Json], plain: Sequence[Json], name: str, first: str) -> FormatName:
    """The one format that the records fit. Raises BadData if they fit several or none.

    plain  the same records under our keys, with preference data converted
    """
    # A table has every column in every row, so keys without a value count only if no format fits otherwise.
    fits = _fitting(plain, filled=True) or _fitting(plain, filled=False)
    beside_text: list[FormatName] = [fit for fit in fits if fit != "text"]
    if "text" in fits and _text_renders_the_rest(plain, beside_text):
        fits = beside_text
    if not fits:
        raise BadData(fits_none(records, plain, first or name))
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
