"""Targets: which target of a batch is which record's, where records share their beginnings."""

from collections.abc import Sequence

from atomtune.batch.collate import Batch
from atomtune.data.records import Example

#: Beginnings of texts: a beginning's number and the token behind it → the number of the longer one. 0: nothing yet.
Tree = dict[tuple[int, int], int]
#: No beginning of the batch.
_NONE = -1


class TargetPlaces:
    """Where a record's targets stand among those of its batch.

    Records that share a target share its place, so it is looked up by the tokens that lead to it. A target named by all
    ids before it would take memory by the square of a record's length: 385 MB for 8,000 tokens.
    """

    def __init__(self, batch: Batch) -> None:
        # Lists of numbers: an index into a tensor for each token took minutes on records of 2,000 tokens.
        ids = batch["input_ids"].tolist()  # [B, T]
        until = None if batch["plan"] is None else batch["plan"].until.tolist()
        self._tree: Tree = {}
        numbers = [_numbers(row, until, self._tree) for row in ids]  # [B, T]
        self._places: dict[int, int] = {}  # the number of the beginning that a target ends → its place
        columns = (batch["row"].tolist(), batch["predicted_from"].tolist(), batch["target"].tolist())
        for place, (row, predicted_from, target) in enumerate(zip(*columns, strict=True)):
            self._places[_longer(self._tree, numbers[row][predicted_from], target)] = place

    def of(self, example: Example) -> list[int | None]:
        """The place of each learned token of an example; None for one that the batch does not have."""
        places: list[int | None] = []
        number = 0
        for token, times in zip(example.ids, example.learn, strict=True):
            number = self._tree.get((number, token), _NONE)  # behind the last learned token nothing is computed
            if times:
                places.append(self._places.get(number))
        return places


def _longer(tree: Tree, number: int, token: int) -> int:
    """The number of a beginning and one more token; a new one where nobody asked for it before."""
    return tree.setdefault((number, token), len(tree) + 1)


def _numbers(ids: Sequence[int], until: Sequence[int] | None, tree: Tree) -> list[int]:
    """Of each token of a row the number of the beginning that it ends: the tokens it sees, itself the last."""
    numbers: list[int] = []
    seen: list[int] = []  # places that the token sees, which are the way to it from the row's beginning
    for place, token in enumerate(ids):
        while until is not None and seen and until[seen[-1]] <= place:
            seen.pop()
        before = numbers[seen[-1]] if seen else 0
        numbers.append(_longer(tree, before, token))
        seen.append(place)
    return numbers
