"""Streaming: records encoded while they are read, for data too large to store a second time.

The order depends only on the files and the seed, so a resumed run finds its place by reading again.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset

from atomtune.data.encoded_source import Rules, encoded
from atomtune.data.encoding.chat_template import Template
from atomtune.data.ledger import Ledger, refuse_unusable
from atomtune.data.reading.sources import distinct_names, stamp_of
from atomtune.errors import BadData


class Stream(IterableDataset):
    """Rows as in the cache, pass after pass without end; each record occurs once per pass.

    buffer   number of waiting rows; each row returned is drawn from them at random
    check    called with the ledger after every part; may raise
    ledger   counts of the first pass of the latest iteration, as far as it was read
    Raises BadData if a file changes while it is read, because a resume would then find other records.
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
        self._stamps = {source: stamp_of(source) for source in sources}

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
        for source, name in zip(self.sources, distinct_names(self.sources), strict=True):
            for part in encoded(source, self.template, self.rules, ledger, name=name):
                self._refuse_changed(source)
                self.check(ledger)
                yield from part.table.to_pylist()
            self._refuse_changed(source)
        refuse_unusable(ledger, self.sources)

    def _refuse_changed(self, source: str) -> None:
        if stamp_of(source) != self._stamps[source]:
            raise BadData(
                f"{source} changed while the run was reading it, so its records are not those the run began with.\n"
                "Put the file back and continue with --resume, or start a new run in another --output_dir."
            )
