"""Preferences: which of two answers is wanted, or whether one is.

The wanted answer is learned like any other; an unwanted one never is. Published shapes: TRL's and LLaMA-Factory's pairs
(`chosen` beside `rejected`: a text, one message, or the whole conversation) and their single answers with a mark
(`label`, `kto_tag`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from atomtune.data.formats.fields import Field, is_empty
from atomtune.data.formats.rendered_text import turns_of
from atomtune.data.formats.schema import WANTED, Schema
from atomtune.data.reading.raw import printable

Json = dict[str, Any]
_PAIRS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"))
#: Keys that make a record one of preferences.
KEYS = frozenset({*WANTED, *(key for pair in _PAIRS for key in pair)})
_YES, _NO = ("true", "1", "yes", "desirable"), ("false", "0", "no", "undesirable")
_NOTE = 'preference data: "{}" is learned as the answer, "{}" is not used'


def read_preference(record: Json, schema: Schema) -> Field[Json]:
    """The record as one of its format without preferences, its wanted answer where an answer stands."""
    marked = _without_mark(record, schema)
    if marked.problems:
        return marked
    for chosen, rejected in _PAIRS:
        if chosen in marked.value and rejected in marked.value:
            return _with_chosen(marked.value, chosen, rejected)
    return marked


def _without_mark(record: Json, schema: Schema) -> Field[Json]:
    for key in WANTED:
        if key not in record:
            continue
        if key == "label" and schema.labels_are_classes and not isinstance(record[key], bool):
            continue  # true and false are no names of classes, whatever stands in the other records
        wanted = is_wanted(record[key])
        if wanted is False:
            problem = f"{key} is {printable(record[key])}: an answer that is not wanted is not trained on"
            return Field(record, (problem,))
        if wanted:
            record = {name: value for name, value in record.items() if name != key}
    return Field(record)


def is_wanted(mark: object) -> bool | None:
    """What a mark says of an answer; None where it is no such mark."""
    if isinstance(mark, bool):
        return mark
    if isinstance(mark, int | float):
        return bool(mark) if mark in (0, 1) else None
    if isinstance(mark, str):
        word = mark.strip().lower()
        if word in _YES:
            return True
        return False if word in _NO else None
    return None


def labels_are_classes(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `label` tells more than two kinds apart in these records, as a data set for classifiers has it."""
    labels = [record["label"] for record in records if not is_empty(record.get("label"))]
    return any(is_wanted(label) is None for label in labels)


def _with_chosen(record: Json, chosen: str, rejected: str) -> Field[Json]:
    """The record with its chosen answer behind its prompt, under the keys of its format."""
    answer = record[chosen]
    rest = {key: value for key, value in record.items() if key not in (chosen, rejected)}
    note = _NOTE.format(chosen, rejected)
    # Beside an instruction: the answer is a text, or one message whose text it is.
    if "instruction" in rest and "output" not in rest:
        return Field({**rest, "output": _text_of(answer)}, notes=(note,))
    # Beside the earlier turns: the answer is the last one, or repeats them all before it.
    for key in ("conversations", "messages"):
        if isinstance(rest.get(key), list):
            return _behind(rest, key, answer, note)
    # Beside a prompt: TRL's explicit shape, or its conversational one, where chosen holds the prompt once more.
    if "prompt" in rest and "completion" not in rest:
        if _is_whole_conversation(answer, rest["prompt"]):
            del rest["prompt"]
            return Field({**rest, "messages": answer}, notes=(note,))
        completion = [answer] if isinstance(answer, dict) else answer
        return Field({**rest, "completion": completion}, notes=(note,))
    # Alone: the whole conversation, with its prompt implied.
    has_answer = any(key in rest for key in ("text", "completion", "output"))
    key = "" if has_answer else _key_of_whole(answer)
    return Field({**rest, key: answer}, notes=(note,)) if key else Field(record)


def _key_of_whole(answer: object) -> str:
    """The key under which an answer that is a whole conversation is read; "" where it is none for sure."""
    if isinstance(answer, list):
        return "messages"
    is_dialogue = isinstance(answer, str) and turns_of(answer) is not None  # as HH-RLHF writes it
    return "text" if is_dialogue else ""


def _text_of(answer: object) -> object:
    """The text of an answer that is one message; whatever else it is, as it is."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, dict):
        return answer.get("content", answer.get("value"))
    return answer


def _behind(rest: Json, key: str, answer: object, note: str) -> Field[Json]:
    """The turns under this key with the chosen answer behind them."""
    turns = rest[key]
    if isinstance(answer, list) and answer[: len(turns)] == turns:
        return Field({**rest, key: answer}, notes=(note,))
    if turns and _is_answer(turns[-1]):
        problem = f"{key} already ends with an answer, and chosen holds another one: leave one of them out"
        return Field(rest, (problem,))
    if isinstance(answer, str):
        is_sharegpt = bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]
        answer = {"from": "gpt", "value": answer} if is_sharegpt else {"role": "assistant", "content": answer}
    answer_turns = answer if isinstance(answer, list) else [answer]
    return Field({**rest, key: [*turns, *answer_turns]}, notes=(note,))


def _is_answer(turn: object) -> bool:
    return isinstance(turn, dict) and (turn.get("role") or turn.get("from")) in ("assistant", "gpt")


def _is_whole_conversation(answer: object, prompt: object) -> bool:
    """Whether the chosen answer is a list of messages that begins with the prompt's."""
    if not isinstance(answer, list) or not answer or not isinstance(answer[0], dict):
        return False
    if isinstance(prompt, list):
        return bool(prompt) and answer[: len(prompt)] == prompt
    return not _is_answer(answer[0])
