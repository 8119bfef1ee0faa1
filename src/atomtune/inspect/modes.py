"""Modes: one record as a template writes it with thinking on and with thinking off.

A template has two modes if it reads the variable `enable_thinking`, as Qwen3's does.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from atomtune.data.encoding.chat_template import CannotExpress, Template
from atomtune.data.encoding.exchanges import as_one_piece, exchange_at
from atomtune.data.encoding.template_probes import thinking_modes
from atomtune.data.formats.schema import THINKING
from atomtune.data.records import Example, Record


def examples_by_mode(template: Template, record: Record) -> tuple[Example, ...]:
    """The record's last answer with its prompt, with thinking on and off; () if the template has only one mode."""
    if not record.learned:
        return ()
    examples = []
    for thinks, mode in thinking_modes(template).items():
        try:
            examples.append(_example(mode, record, f"{record.origin}  {THINKING}={str(thinks).lower()}"))
        except CannotExpress:
            return ()
    return tuple(examples)


def _example(template: Template, record: Record, origin: str) -> Example:
    variables: Mapping[str, Any] = {key: value for key, value in record.variables.items() if key != THINKING}
    exchange = exchange_at(template, replace(record, variables=variables), record.learned[-1])
    prompt_ids, answer_ids = template.tokens.ids_of([as_one_piece(exchange.prompt), exchange.answer])
    answer_ids = [*answer_ids, template.tokenizer.convert_tokens_to_ids(exchange.stop)]
    return Example((*prompt_ids, *answer_ids), (*[0] * len(prompt_ids), *[1] * len(answer_ids)), origin)
