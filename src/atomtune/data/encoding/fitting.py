"""Fitting: shorter prompts for the answers of a record whose exchange exceeds max_tokens.

Consecutive answers keep the same shortened beginning as long as they fit after it: they become one Example, and the
shared part is computed once. A new beginning leaves room for the answers that follow, up to half of the space.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from atomtune.data.encoding.chat_template import CannotExpress, Template
from atomtune.data.encoding.exchanges import prompt_at
from atomtune.data.encoding.tokenized import PieceIds, TokenizedExchange
from atomtune.data.encoding.truncate import shorten, without_oldest
from atomtune.data.records import Prompt, Record, Turn, with_each_part


class Fitting:
    """Shortens the exchanges of one record to max_tokens; call `shortened` for its answers in order."""

    def __init__(
        self,
        template: Template,
        record: Record,
        exchanges: Sequence[TokenizedExchange],
        ids: PieceIds,
        *,
        max_tokens: int,
    ) -> None:
        self._template, self._record, self._ids, self._max_tokens = template, record, ids, max_tokens
        self._all_tokens = exchanges[-1].tokens if exchanges else 0
        self._before: tuple[Record, int] | None = None  # the record as shortened for the previous answer; its index
        self._prompts: list[tuple[Record, Prompt[list[int]], int]] = []  # (record, prompt, tokens) that fit this answer

    def shortened(self, exchange: TokenizedExchange, at: int) -> TokenizedExchange | None:
        """The exchange of the turn `at`, which is too long, with a shorter prompt; None if no prompt leaves room."""
        self._prompts = []
        room = self._max_tokens - len(exchange.answer)
        shorter = self._shorter(exchange, at, room) if room > 0 else None
        if shorter is None:
            return None
        self._before = shorter, at
        prompt, tokens = next((prompt, tokens) for tried, prompt, tokens in reversed(self._prompts) if tried == shorter)
        return exchange._replace(prompt=prompt, prompt_tokens=tokens)

    def _shorter(self, exchange: TokenizedExchange, at: int, room: int) -> Record | None:
        """The record up to the answer at `at`, shortened until its prompt has at most `room` tokens; None if it cannot.

        Tried in this order: the beginning that was shortened for the previous answer; a new one that leaves room for
        later answers too; one that leaves room for this answer alone.
        """
        if self._before is not None:
            before, at_before = self._before
            longer = replace(before, turns=(*before.turns, *self._record.turns[at_before + 1 : at + 1]))
            if self._fits(longer, room):
                return longer
        until = replace(self._record, turns=self._recent(at))
        # Where the search starts: the share of the tokens that fits, over the share of the turns that is still there.
        share = min(room / exchange.prompt_tokens * (at + 1) / len(until.turns), 1.0)
        if later := max(self._all_tokens - exchange.tokens, 0):
            less = room - min(later, room // 2)
            shorter = without_oldest(until, lambda record: self._fits(record, less), share=share * less / room)
            if shorter is not None:
                return shorter
        return shorten(until, lambda record: self._fits(record, room), share=share)

    @cached_property
    def _places(self) -> Mapping[str, Sequence[int]]:
        """Role → the indices of its turns."""
        places: defaultdict[str, list[int]] = defaultdict(list)
        for at, turn in enumerate(self._record.turns):
            places[turn.role].append(at)
        return places

    def _fits(self, record: Record, room: int) -> bool:
        try:
            prompt = prompt_at(self._template, record, len(record.turns) - 1)
        except CannotExpress:  # the template accepts the whole conversation, but not without some turns or texts
            return False
        (in_ids,) = with_each_part([prompt], self._ids.__getitem__)
        tokens = sum(map(len, in_ids.parts()))
        if tokens > room:
            return False
        self._prompts.append((record, in_ids, tokens))
        return True

    def _recent(self, at: int) -> tuple[Turn, ...]:
        """The turns before an answer that could fit at all, and the answer.

        These are the system turns, its question, and the last max_tokens turns, as each has at least one token. Without
        this limit, each answer of a 20,000-turn history would be searched through all turns before it.
        """
        turns = self._record.turns
        first = max(0, at + 1 - self._max_tokens)
        while turns[first].role == "tool":  # a result without its call
            first += 1
        systems, questions = self._places["system"], self._places["user"]
        before = set(systems[: bisect_left(systems, first)])
        if (number := bisect_left(questions, at)) and questions[number - 1] < first:
            before.add(questions[number - 1])
        return (*map(turns.__getitem__, sorted(before)), *turns[first : at + 1])
