"""Formats: one JSON value → one Record, or the reasons why not.

Before: files.py.  After: template.py.
Known here: `alpaca`, the tutorial's instruction/input/output, with `system` and `history` ([[question, answer], …])
where a conversation went before. Only the last answer is learned.
"""

from atomtune.data.files import Found
from atomtune.data.records import Account, Record, Refusal, Turn

_KEYS = ("instruction", "input", "output", "system")
_OPTIONAL = ("input", "system")
_TYPO = "instrution"  # stands in the tutorial's own format example


def to_record(found: Found, account: Account) -> Record | Refusal:
    """Read one alpaca record; what is accepted but unusual is counted in account.notices."""
    value, origin = found.value, found.origin
    if not isinstance(value, dict):
        return Refusal(origin, f"{_kind(value)}; expected an object with instruction, input and output")
    if _TYPO in value and "instruction" not in value:
        value = {("instruction" if key == _TYPO else key): text for key, text in value.items()}
        account.notices[f'key "{_TYPO}" read as "instruction"'] += 1
    problems = [
        f'no key "{key}"; keys here: {", ".join(map(_printable, found.value)) or "none"}'
        for key in ("instruction", "output")
        if key not in value
    ]
    texts = {key: _text(value.get(key), key, problems) for key in _KEYS if key in value}
    earlier = _history(value.get("history") or [], problems)
    if problems:
        return Refusal(origin, "; ".join(problems))
    if not texts["output"].strip():
        return Refusal(origin, "output is empty: there is nothing to learn")
    question = texts.get("input", "")
    if not texts["instruction"].strip() and not question.strip():
        return Refusal(origin, "instruction and input are both empty")
    for key in value.keys() - {*_KEYS, "history"}:
        if value[key] not in (None, "", [], {}):
            account.notices[f'key "{_printable(key)}" is not used by this format'] += 1
    if texts.get("system", "").strip():
        earlier.insert(0, Turn("system", texts["system"]))
    return Record((*earlier, Turn("user", texts["instruction"], question), Turn("assistant", texts["output"])), origin)


def _history(pairs: object, problems: list[str]) -> list[Turn]:
    """Earlier turns from [[question, answer], …]."""
    turns: list[Turn] = []
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        problems.append(f"history is {_kind(pairs)}; expected a list of [question, answer] pairs")
        return turns
    for number, (question, answer) in enumerate(pairs, 1):
        turns.append(Turn("user", _text(question, f"history {number}'s question", problems)))
        turns.append(Turn("assistant", _text(answer, f"history {number}'s answer", problems)))
    return turns


def _text(value: object, key: str, problems: list[str]) -> str:
    if value is None and key in _OPTIONAL:
        return ""
    if not isinstance(value, str):
        problems.append(f"{key} is {_kind(value)}; expected text")
        return ""
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            problems.append(f"{key} holds half a surrogate pair at character {error.start + 1}")
    return value


def _printable(text: object) -> str:
    """A key as it can be written down, halves of surrogate pairs included."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")
