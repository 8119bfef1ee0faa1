"""Stream: records encoded as they are drawn, for data larger than what a disk should keep twice.

Before: data.cache encodes part by part.  After: batch.collate.
The order is a function of the files and the seed alone, so a resumed run finds its place by reading again.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset

from atomtune.data.cache import Rules, encoded
from atomtune.data.encoding.chat_template import Template
from atomtune.data.ledger import Ledger
from atomtune.errors import BadData


class Stream(IterableDataset):
    """Rows as the store has them, pass after pass without an end; each record once a pass.

    buffer   rows that wait; each time one of them is drawn at random
    check    is shown the ledger after every part and may raise
    ledger  of the newest reading's first pass, as far as it has come
    """

    def __init__(
        self,
        sources: Sequence[str],
        template: Template,
        rules: Rules,
        *,
        buffer: int,
        seed: int,
        check: Callable[[Ledger], None],
    ) -> None:
        super().__init__()
        self.sources, self.template, self.rules = sources, template, rules
        self.buffer, self.seed, self.check = buffer, seed, check
        self.ledger = Ledger()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.ledger = Ledger()
        for number in itertools.count():
            draw = random.Random(f"{self.seed} {number}")
            waiting: list[dict[str, Any]] = []
            for row in self._rows(self.ledger if number == 0 else Ledger()):
                waiting.append(row)
                if len(waiting) > self.buffer:
                    at = draw.randrange(len(waiting))
                    waiting[at], waiting[-1] = waiting[-1], waiting[at]
                    yield waiting.pop()
            draw.shuffle(waiting)
            yield from waiting

    def _rows(self, ledger: Ledger) -> Iterator[dict[str, Any]]:
        for source in self.sources:
            for part in encoded(source, self.template, self.rules, ledger):
                self.check(ledger)
                yield from part.table.to_pylist()
        if not ledger.records_used:
            raise BadData(f"{', '.join(self.sources)}: none of {ledger.records_read:,} records can be used.")
