"""Targets: the indices of a record's targets among those of its batch, in which records may share a prefix."""

from collections.abc import Sequence

from atomtune.batch.collate import Batch
from atomtune.data.records import Example

#: A trie of the batch's prefixes: (number of a prefix, next token) → number of the longer prefix. 0: the empty prefix.
Trie = dict[tuple[int, int], int]
#: The number of any prefix that is not in the batch.
_NONE = -1


class TargetPlaces:
    """Finds a record's targets among the N targets of its batch.

    Records that share a target share its index, so a target is identified by the tokens up to it: by the number of this
    prefix in a trie. The prefixes themselves as keys would take quadratic memory: 385 MB for 8,000 tokens.
    """

    def __init__(self, batch: Batch) -> None:
        # Lists, as indexing a tensor for each token took minutes on records of 2,000 tokens.
        ids = batch["input_ids"].tolist()  # [B, T]
        until = None if batch["plan"] is None else batch["plan"].until.tolist()
        self._trie: Trie = {}
        numbers = [_numbers(row, until, self._trie) for row in ids]  # [B, T]
        self._places: dict[int, int] = {}  # number of the prefix that ends with the target → index of the target
        columns = (batch["row"].tolist(), batch["predicted_from"].tolist(), batch["target"].tolist())
        for place, (row, predicted_from, target) in enumerate(zip(*columns, strict=True)):
            self._places[_longer(self._trie, numbers[row][predicted_from], target)] = place

    def of(self, example: Example) -> list[int | None]:
        """For each learned token of the example, its index among the batch's targets; None if it is not there."""
        places: list[int | None] = []
        number = 0
        for token, times in zip(example.ids, example.learn, strict=True):
            number = self._trie.get((number, token), _NONE)  # the batch may lack tokens after the last learned one
            if times:
                places.append(self._places.get(number))
        return places


def _longer(trie: Trie, number: int, token: int) -> int:
    """The number of the prefix extended by one token, which is added to the trie if it is new."""
    return trie.setdefault((number, token), len(trie) + 1)


def _numbers(ids: Sequence[int], until: Sequence[int] | None, trie: Trie) -> list[int]:
    """For each token of a row, the number of its prefix: the tokens that it sees, itself included."""
    numbers: list[int] = []
    seen: list[int] = []  # indices of the tokens that the current one sees: its path
    for place, token in enumerate(ids):
        while until is not None and seen and until[seen[-1]] <= place:
            seen.pop()
        before = numbers[seen[-1]] if seen else 0
        numbers.append(_longer(trie, before, token))
        seen.append(place)
    return numbers
