"""Stream: records encoded as they are drawn, for data larger than what a disk should keep twice.

Before: data.cache encodes part by part.  After: batch.collate.
The order is a function of the files and the seed alone, so a resumed run finds its place by reading again.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset

from atomtune.data.records import Account
from atomtune.data.cache import Rules, encoded
from atomtune.data.encoding.chat_template import Template
from atomtune.errors import BadData


class Stream(IterableDataset):
    """Rows as the store has them, pass after pass without an end; each record once a pass.

    buffer   rows that wait; each time one of them is drawn at random
    check    is shown the account after every part and may raise
    account  of the newest reading's first pass, as far as it has come
    """

    def __init__(
        self,
        sources: Sequence[str],
        template: Template,
        rules: Rules,
        *,
        buffer: int,
        seed: int,
        check: Callable[[Account], None],
    ) -> None:
        super().__init__()
        self.sources, self.template, self.rules = sources, template, rules
        self.buffer, self.seed, self.check = buffer, seed, check
        self.account = Account()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.account = Account()
        for number in itertools.count():
            draw = random.Random(f"{self.seed} {number}")
            waiting: list[dict[str, Any]] = []
            for row in self._rows(self.account if number == 0 else Account()):
                waiting.append(row)
                if len(waiting) > self.buffer:
                    at = draw.randrange(len(waiting))
                    waiting[at], waiting[-1] = waiting[-1], waiting[at]
                    yield waiting.pop()
            draw.shuffle(waiting)
            yield from waiting

    def _rows(self, account: Account) -> Iterator[dict[str, Any]]:
        for source in self.sources:
            for part in encoded(source, self.template, self.rules, account):
                self.check(account)
                yield from part.table.to_pylist()
        if not account.records_used:
            raise BadData(f"{', '.join(self.sources)}: none of {account.records_read:,} records can be used.")
