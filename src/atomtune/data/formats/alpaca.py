"""Alpaca: the tutorial's instruction/input/output, with `system` and `history` ([[question, answer], …]).

Before: formats.py.  After: template.py. The answers in history are learned like the last one.
"""

from typing import Any

from atomtune.data.formats.fields import Reading, is_blank, kind
from atomtune.data.records import Record, Refusal, Turn

_USED = frozenset({"instruction", "input", "output", "system", "history", "tools", "functions"})


def alpaca_record(value: dict[str, Any], reading: Reading) -> Record | Refusal:
    """Read one alpaca record, given under our keys."""
    problems = reading.problems
    texts = {}
    for key in ("instruction", "output"):
        if key in value:
            texts[key] = reading.text(value[key], key)
    question = value.get("input")
    question = "" if question is None else reading.text(question, "input")
    history = value.get("history")
    turns = _history(history, reading) if history else []
    tools = reading.tools(value) if "tools" in value or "functions" in value else ()
    if "system" in value:
        turns = reading.after_system(value, turns)
    if problems:
        return reading.refused()
    if is_blank(texts["output"]):
        problems.append("output is empty: there is nothing to learn")
    elif is_blank(texts["instruction"]) and is_blank(question):
        problems.append("instruction and input are both empty")
    reading.note_unused(value, _USED)
    turns += [Turn("user", texts["instruction"], question), Turn("assistant", texts["output"])]
    return reading.end(turns, tools)


def _history(history: object, reading: Reading) -> list[Turn]:
    """Earlier turns from [[question, answer], …], or the JSON text of it."""
    turns: list[Turn] = []
    pairs = reading.json(history, "history") if isinstance(history, str) and history.lstrip()[:1] == "[" else history
    if pairs is None or (isinstance(pairs, str) and is_blank(pairs)):
        return turns
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        reading.problems.append(f"history is {kind(pairs)}; expected a list of [question, answer] pairs")
        return turns
    for number, (question, answer) in enumerate(pairs, 1):
        asked = reading.text(question, f"history {number}'s question")
        said = reading.text(answer, f"history {number}'s answer")
        if isinstance(question, str) and is_blank(asked):
            reading.problems.append(f"history {number}'s question is empty")
        if isinstance(answer, str) and is_blank(said):
            reading.problems.append(f"history {number}'s answer is empty: there is nothing to learn")
        turns += [Turn("user", asked), Turn("assistant", said)]
    return turns
