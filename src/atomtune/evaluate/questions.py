"""Questions: each learned answer of a record, with the prompt that a server would be sent for it.

They come from the Examples that training would make of the same record, so that what is measured is what is learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from atomtune.data.cache import EncodedData, concatenate, examples_of
from atomtune.data.encoded_source import Rules, records_of
from atomtune.data.encoding.chat_template import Template, tool_name
from atomtune.data.example_table import as_examples
from atomtune.data.reading.sources import distinct_names
from atomtune.data.records import Example, Record, learned_spans
from atomtune.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """One answer to generate, and the reference to compare it with."""

    prompt_ids: tuple[int, ...]
    reference_ids: tuple[int, ...]  # with its stop token
    prompt: str
    reference: str


@dataclass(frozen=True)
class EvalRecord:
    """One record: the Examples whose likelihood is computed, and the questions that are asked."""

    origin: str
    examples: tuple[Example, ...]
    questions: tuple[Question, ...]
    tools: frozenset[str]  # names of the available tools
    user_text: str = ""  # the user's words before the last answer; "" if unknown
    calls: bool = False  # whether a learned answer calls a tool


#: The file's number and the record's origin; two files may have the same name.
Key = tuple[int, str]


def read_records(
    sources: Sequence[str], template: Template, rules: Rules, wanted: frozenset[str] | None = None
) -> tuple[dict[Key, EvalRecord], EncodedData]:
    """The records of these files as a template writes them; wanted: only those of these origins."""
    names = distinct_names(sources)
    parts = [examples_of(source, template, rules, name=name) for source, name in zip(sources, names, strict=True)]
    records: dict[Key, EvalRecord] = {}
    for number, (source, name, part) in enumerate(zip(sources, names, parts, strict=True)):
        if not len(part.examples):
            continue
        for row, record in zip(part.examples, records_of(source, rules, part.examples, name=name), strict=True):
            if wanted is None or record.origin in wanted:
                records[number, record.origin] = eval_record(record, as_examples(row), template.tokenizer)
    return records, concatenate(parts)


def eval_record(record: Record, examples: tuple[Example, ...], tokenizer: Tokenizer) -> EvalRecord:
    """A record with its questions; a text that is no dialogue has no questions, only a likelihood."""
    questions: list[Question] = []
    if record.turns[-1].role != "text":
        for example in examples:
            for start, end in learned_spans(example):
                questions.append(_question(example.ids, start, end, tokenizer))
    tools = frozenset(tool_name(tool) for tool in record.tools)
    calls = any(record.turns[at].calls for at in record.learned)
    return EvalRecord(record.origin, examples, tuple(questions), tools, _user_text(record), calls)


def _user_text(record: Record) -> str:
    """What the user says before the last learned answer, without the text that the template adds."""
    before = record.turns[: record.learned[-1]] if record.learned else ()
    users = [turn for turn in before if turn.role == "user"]
    return "\n".join(part for part in (users[-1].text, users[-1].input) if part) if users else ""


def _question(ids: tuple[int, ...], start: int, end: int, tokenizer: Tokenizer) -> Question:
    answer = ids[start:end]
    return Question(
        prompt_ids=ids[:start],
        reference_ids=answer,
        prompt=tokenizer.decode(list(ids[:start]), skip_special_tokens=False),
        reference=answer_text(answer[:-1], tokenizer),
    )


def answer_text(ids: Sequence[int], tokenizer: Tokenizer, *, stopped: bool = True) -> str:
    """An answer without its stop token, as text; tags of thoughts and tool calls are kept, even as control tokens.

    stopped  whether it ended by itself; if not, the limit may have cut its last character, which is left out
    """
    text = tokenizer.decode(list(ids), skip_special_tokens=False)
    return text.strip() if stopped else text.rstrip("\ufffd").strip()
