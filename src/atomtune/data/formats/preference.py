"""Preferences: records of preference data become plain records whose answer is the wanted one.

The wanted answer is learned like any other; an unwanted one never is. Read are the formats of TRL and LLaMA-Factory:
pairs (`chosen` and `rejected`: a text, one message, or the whole conversation) and single answers with a mark (`label`,
`kto_tag`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from atomtune.choices import FormatName
from atomtune.data.formats.fields import Field, is_empty
from atomtune.data.formats.rendered_text import begins_like, turns_of
from atomtune.data.formats.schema import WANTED, Schema
from atomtune.data.reading.raw import printable

Json = dict[str, Any]
_PAIRS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"))
_YES, _NO = ("true", "1", "yes", "desirable"), ("false", "0", "no", "undesirable")
#: The words for a pair without a prompt.
PAIR_ALONE = (
    "preference data (chosen, rejected) without a prompt. The chosen answers are learned if the record also has an "
    "instruction, a prompt, messages or conversations, or if chosen is a list of messages"
)
_NOTE = '"{}" of preference data is learned as the answer, "{}" is not used'


def read_preference(record: Json, schema: Schema) -> Field[Json]:
    """The record without its preference keys: the chosen answer takes the place of the answer.

    A record whose answer is marked as unwanted gets a problem.
    """
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
            continue  # a class name; a boolean is a mark, even if other records of the file have class names
        wanted = is_wanted(record[key])
        if wanted is False:
            problem = f"{key} is {printable(record[key])}: an answer that is not wanted is not trained on"
            return Field(record, (problem,))
        if wanted:
            record = {name: value for name, value in record.items() if name != key}
    return Field(record)


def is_wanted(mark: object) -> bool | None:
    """Whether a mark means that the answer is wanted; None if it is not a mark."""
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


def labels_are_classes(records: Sequence[Mapping[str, Any]], format_name: FormatName) -> bool:
    """Whether `label` is a class, as in a data set for classification.

    It is one if some label in these records is not a yes-or-no mark, or if all belong to texts without turns.
    """
    labelled = [record for record in records if not is_empty(record.get("label"))]
    if any(is_wanted(record["label"]) is None for record in labelled):
        return True
    texts = [str(record.get("text")) for record in labelled] if format_name == "text" else []
    return bool(texts) and not any(map(begins_like, texts))


def _with_chosen(record: Json, chosen: str, rejected: str) -> Field[Json]:
    """The record with the chosen answer after its prompt, under the keys of its format."""
    answer = record[chosen]
    rest = {key: value for key, value in record.items() if key not in (chosen, rejected)}
    note = _NOTE.format(chosen, rejected)
    # With an instruction: the answer is a text, or a single message that contains it.
    if "instruction" in rest and "output" not in rest:
        return Field({**rest, "output": _text_of(answer)}, notes=(note,))
    # With the earlier turns: the answer is the last turn, or a list that repeats all turns and ends with it.
    for key in ("conversations", "messages"):
        if isinstance(rest.get(key), list):
            return _behind(rest, key, answer, note)
    # With a prompt: TRL's explicit format, or its conversational one, in which chosen repeats the prompt.
    if "prompt" in rest and "completion" not in rest:
        if _is_whole_conversation(answer, rest["prompt"]):
            del rest["prompt"]
            return Field({**rest, "messages": answer}, notes=(note,))
        completion = [answer] if isinstance(answer, dict) else answer
        return Field({**rest, "completion": completion}, notes=(note,))
    # Alone: chosen is the whole conversation, prompt included.
    has_answer = any(key in rest for key in ("text", "completion", "output"))
    key = "" if has_answer else _key_of_whole(answer)
    return Field({**rest, key: answer}, notes=(note,)) if key else Field(record)


def _key_of_whole(answer: object) -> str:
    """The key under which a `chosen` that is a whole conversation is read; "" if it may not be one."""
    if isinstance(answer, list):
        return "messages"
    is_dialogue = isinstance(answer, str) and turns_of(answer) is not None  # as in HH-RLHF
    return "text" if is_dialogue else ""


def _text_of(answer: object) -> object:
    """The text of an answer that is a single message; any other answer unchanged."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, dict):
        return answer.get("content", answer.get("value"))
    return answer


def _behind(rest: Json, key: str, answer: object, note: str) -> Field[Json]:
    """The record with the chosen answer appended to the turns under `key`, which may also repeat them."""
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
