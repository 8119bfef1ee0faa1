"""Omissions: the parts of a record that its template leaves out.

If the rest can still be learned, a note tells the user. If not, CannotExpress is raised: for an answer without its text
or one of its calls, or if the model would not see the question or the tool result that it answers.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from atomtune.data.encoding.chat_template import CannotExpress
from atomtune.data.encoding.templated_record import TemplatedRecord
from atomtune.data.encoding.thoughts import with_thoughts_apart
from atomtune.data.records import Exchange, Record, shared_parts

NOT_WRITTEN = {
    "thoughts": "the template leaves out an answer's reasoning, so it is not learned",
    "text": "the template leaves out the text next to a tool call, so it is not learned",
    "white space": "the template trims whitespace around an answer, so it is not learned",
    "system": "the template leaves out a system prompt, so the model does not read it",
    "documents": "the template leaves out a record's documents, so the model does not read them",
    "tools": "the template leaves out the list of tools, so the model reads only what the record's texts say of them",
}


class Omissions:
    """Finds what the template leaves out of one record."""

    def __init__(self, templated: TemplatedRecord) -> None:
        self._templated = templated
        self._written_numbers: set[int] = set()  # numbers of calls in one turn that are written in full

    def in_answer(self, at: int, answer: str) -> tuple[str, ...]:
        """Notes on the answer at `at`.

        answer  what the template writes for it
        Raises CannotExpress if its text or a call is missing.
        """
        template, turn = self._templated.template, self._templated.record.turns[at]
        if turn.calls:
            self._refuse_lost_calls(at, answer)
        if template.knows_thoughts:
            turn = with_thoughts_apart(turn)
        notes = []
        if turn.reasoning.strip() and turn.reasoning.strip() not in answer:
            notes.append(NOT_WRITTEN["thoughts"])
        if turn.text.strip() and turn.text.strip() not in answer:
            if not turn.calls:
                raise CannotExpress(f"{template.title} does not write the text of an answer")
            notes.append(NOT_WRITTEN["text"])
        elif turn.text not in answer and not turn.reasoning:
            notes.append(NOT_WRITTEN["white space"])
        return tuple(notes)

    def in_prompt(self, at: int, prompt: str) -> tuple[str, ...]:
        """Notes on the rendered prompt before the turn at `at`. Raises CannotExpress if it lacks an earlier turn."""
        self._refuse_lost_turns(at, prompt)
        tools, variables = self._templated.tools, self._templated.variables
        notes = []
        if variables.get("documents") and self._writes(prompt, at, tools, {**variables, "documents": None}):
            notes.append(NOT_WRITTEN["documents"])  # a server would silently leave them out
        if tools and self._writes(prompt, at, (), variables):
            # Their names are in a text, for example a system text that lists the tools; else the record was refused.
            notes.append(NOT_WRITTEN["tools"])
        return tuple(notes)

    def _refuse_lost_calls(self, at: int, answer: str) -> None:
        templated = self._templated
        title = templated.template.title
        if all(str(call.get("name")) not in answer for call in templated.record.turns[at].calls):
            suggested = templated.template.suggested_for_tools
            raise CannotExpress(f"{title} has no place for tool calls; --template {suggested} has one")
        message = templated.message_of(at)
        calls = message["tool_calls"]
        if len(calls) == 1 or len(calls) in self._written_numbers:
            return
        # Several calls may have the same name. Each gets a unique one, and the rendered text is searched for these.
        names = [f"atomtune-call-{number}" for number in range(len(calls))]
        renamed = [
            {**call, "function": {**call["function"], "name": name}} for call, name in zip(calls, names, strict=True)
        ]
        turn = {**message, "tool_calls": renamed}
        whole = templated.render([*templated.messages_before(at), turn], prompt=False)
        written = sum(name in whole for name in names)
        if written < len(calls):
            raise CannotExpress(f"{title} writes {written} of the {len(calls)} calls of a turn")
        self._written_numbers.add(len(calls))

    def _refuse_lost_turns(self, until: int, prompt: str) -> None:
        """Raise CannotExpress if the prompt lacks a question or a tool result from before the turn at `until`."""
        reached = 0  # position in the prompt; templates write turns in order, so most are found from here
        for at, turn in enumerate(self._templated.record.turns[:until]):
            if turn.role not in ("user", "tool"):
                continue
            for message in self._templated.messages_of(at):
                text = str(message["content"]).strip()
                place = prompt.find(text, reached)
                if place >= 0:
                    reached = place
                elif text not in prompt and not _is_there_as_json(text, prompt):
                    title, number = self._templated.template.title, at + 1
                    raise CannotExpress(f"{title} leaves out what turn {number} ({turn.role}) says")

    def _writes(self, prompt: str, at: int, tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> bool:
        """Whether this is the prompt before the turn at `at` with other tools or variables too."""
        templated = self._templated
        try:
            return templated.template.render(templated.messages_before(at), tools=tools, variables=variables) == prompt
        except CannotExpress:  # it cannot do without them
            return False


def _is_there_as_json(text: str, prompt: str) -> bool:
    """Whether the prompt has a text as a JSON string; some templates write tool results this way."""
    return any(json.dumps(text, ensure_ascii=ascii_only)[1:-1] in prompt for ascii_only in (False, True))


def notes_on(record: Record, exchanges: Sequence[Exchange]) -> tuple[str, ...]:
    """Notes for the user on an accepted record. Each appears once, because the ledger counts records."""
    notes = [note for exchange in exchanges for note in exchange.lost]
    if _lacks_a_system_text(record, exchanges):
        notes.append(NOT_WRITTEN["system"])
    return tuple(dict.fromkeys(notes))


def _lacks_a_system_text(record: Record, exchanges: Sequence[Exchange]) -> bool:
    """Whether a prompt lacks an earlier system text. Parts shared with the previous prompt are searched once."""
    systems = [(at, turn.text.strip()) for at, turn in enumerate(record.turns) if turn.role == "system"]
    if not systems:
        return False
    waiting = deque(systems)
    unseen: set[str] = set()  # in none of the parts that the prompts share so far
    for exchange, shared in zip(exchanges, shared_parts(exchange.prompt for exchange in exchanges), strict=True):
        if not shared:
            waiting, unseen = deque(systems), set()
        while waiting and waiting[0][0] < exchange.at:
            unseen.add(waiting.popleft()[1])
        new = exchange.prompt.history[shared : exchange.prompt.length]
        unseen = {text for text in unseen if not any(text in piece.text for piece in new)}
        if not all(text in exchange.prompt.asks.text for text in unseen):
            return True
    return False
