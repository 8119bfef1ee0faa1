"""Alpaca: the tutorial's instruction/input/output, with optional `system` and `history` ([[question, answer], …]).

The answers in `history` are learned like the last one. The last one may have reasoning (`reasoning_content`), and the
record variables of the template (`enable_thinking`, …).
"""

from typing import Any

from atomtune.data.formats.conversation import Conversation, read_variables, with_reasoning, with_system
from atomtune.data.formats.fields import (
    Field,
    is_blank,
    kind,
    notes_on_unused,
    problems_of,
    read_json,
    read_text,
    read_tools,
)
from atomtune.data.formats.schema import KWARGS, REASONING, VARIABLES, Schema
from atomtune.data.records import Turn

_USED = frozenset(
    {"instruction", "input", "output", "system", "history", "tools", "functions", KWARGS, *VARIABLES, *REASONING}
)
_NO_TEXT = Field("")


def read_alpaca(record: dict[str, Any], schema: Schema) -> Field[Conversation]:
    """Read one Alpaca record whose keys are already renamed to ours."""
    instruction = read_text(record["instruction"], "instruction") if "instruction" in record else _NO_TEXT
    answer = read_text(record["output"], "output") if "output" in record else _NO_TEXT
    question = _NO_TEXT if record.get("input") is None else read_text(record["input"], "input")
    tools = read_tools(record)
    history = read_history(record.get("history"))
    earlier = with_system(record, history.value)
    last_answer = with_reasoning(Turn("assistant", answer.value), record)
    variables = read_variables(record)
    problems = problems_of([instruction, answer, question, history, tools, earlier, last_answer, variables])
    if not problems:  # a value that is not text was replaced by ""; do not report that as empty too
        problems = _problems_of_blank(record, instruction.value, question.value, answer.value)
    last_question = Turn("user", instruction.value, question.value)
    turns = (*earlier.value, last_question, last_answer.value)
    conversation = Conversation(turns, tools.value, variables.value)
    return Field(conversation, problems, notes_on_unused(record, _USED))


def _problems_of_blank(record: dict[str, Any], instruction: str, question: str, answer: str) -> tuple[str, ...]:
    """Problems with texts that are empty or only white space; missing keys are reported elsewhere."""
    if "output" in record and is_blank(answer):
        return ("output is empty: there is nothing to learn",)
    if "instruction" in record and is_blank(instruction) and is_blank(question):
        return ("instruction and input are both empty",)
    return ()


def read_history(value: object) -> Field[tuple[Turn, ...]]:
    """The earlier turns from [[question, answer], …] or its JSON text."""
    if not value or (isinstance(value, str) and is_blank(value)):
        return Field(())
    pairs: Any = value
    if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of a table
        parsed = read_json(value, "history")
        if parsed.problems:
            return Field((), parsed.problems)
        pairs = parsed.value
    if not isinstance(pairs, list) or not all(_is_pair(item) for item in pairs):
        return Field((), (f"history is {kind(pairs)}; expected a list of [question, answer] pairs",))
    turns: list[Turn] = []
    problems: list[str] = []
    for number, (question, answer) in enumerate(pairs, 1):
        question_text = read_text(question, f"history {number}'s question")
        answer_text = read_text(answer, f"history {number}'s answer")
        problems += question_text.problems
        problems += answer_text.problems
        if not question_text.problems and is_blank(question_text.value):
            problems.append(f"history {number}'s question is empty")
        if not answer_text.problems and is_blank(answer_text.value):
            problems.append(f"history {number}'s answer is empty: there is nothing to learn")
        turns.append(Turn("user", question_text.value))
        turns.append(Turn("assistant", answer_text.value))
    return Field(tuple(turns), tuple(problems))


def _is_pair(item: object) -> bool:
    return isinstance(item, list) and len(item) == 2
