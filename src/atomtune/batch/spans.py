"""Spans: a row's attention as variable-length sequences, which a GPU kernel computes in one launch.

Each segment is one sequence; its keys are the path above it and the segment itself.
Derivation: docs/geometry.md. Letters: T tokens in the row, K keys in all spans.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional

from atomtune.batch.paths import last_of, path_to
from atomtune.batch.row import Segment

#: `rounded` pads the number of keys to a multiple of this, so that there are few shapes. Small trees gather some 16
#: times as many.
_KEY_STEP = 512


@dataclass(frozen=True, slots=True)
class Spans:
    """A row as variable-length sequences: span s has the queries of one segment and the keys [path | segment].

    query_starts    [spans + 1]  int32, the first token of each span's segment; the last entry is T
    key_starts      [spans + 1]  int32, start of each span's keys in `keys`; the last entry is K
    keys            [K] the token of each key; None if every span sees only itself (a packed row)
    longest_queries, longest_keys   the maximum of one span

    A shared prefix p and its branches b and c, T = 5:

        row            p0 p1 b0 b1 c0                 span 1   p0 p1 b0 b1
        query_starts    0     2     4  5                 b0     1  1  1  .
        keys           p0 p1 | p0 p1 b0 b1 | p0 p1 c0    b1     1  1  1  1
        key_starts      0       2             6     9

    The mask of a span is causal and aligned at its lower right corner: the last query sees all keys. A sliding window w
    keeps the last w keys of each query, so the last w - 1 tokens of the path are enough.
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    keys: torch.Tensor | None
    longest_queries: int
    longest_keys: int

    def rounded(self, tokens: int) -> "Spans":
        """The same attention padded to one of few shapes.

        Spans without queries are appended. All but the last have no keys either; the last has those that pad `keys`.
        tokens  T
        """
        appended = _power_of_two(len(self.query_starts) + 1) - len(self.query_starts)
        keys, count, padded_count = self.keys, tokens, tokens
        if keys is not None:
            count = len(keys)  # K
            padded_count = -(-count // _KEY_STEP) * _KEY_STEP
            keys = functional.pad(keys, (0, padded_count - count))
        # The drawing above:   query_starts   0 2 4 5 | 5 5 5 5      key_starts   0 2 6 9 | 9 9 9 512
        key_starts = functional.pad(self.key_starts, (0, appended - 1), value=count)
        return Spans(
            query_starts=functional.pad(self.query_starts, (0, appended), value=tokens),
            key_starts=functional.pad(key_starts, (0, 1), value=padded_count),
            keys=keys,
            longest_queries=_power_of_two(self.longest_queries),
            longest_keys=_power_of_two(max(self.longest_keys, padded_count - count)),
        )


def cut_into_spans(parts: Sequence[Segment], window: int | None, tokens: int) -> Spans:
    """The spans of a row whose segments are `parts`; its padding is one more span, which sees only itself.

    window  the sliding window of the layer, or None
    tokens  T, padding included
    """
    query_starts, key_starts = [0], [0]
    keys: list[int] = []
    for part in parts:
        path = path_to(parts, part.parent)
        if window is not None:
            path = last_of(path, window - 1)
        for start, end in (*path, (part.start, part.end)):
            keys += range(start, end)
        query_starts.append(part.end)
        key_starts.append(len(keys))
    if tokens > query_starts[-1]:
        keys += range(query_starts[-1], tokens)
        query_starts.append(tokens)
        key_starts.append(len(keys))
    return Spans(
        torch.tensor(query_starts, dtype=torch.int32),
        torch.tensor(key_starts, dtype=torch.int32),
        None if len(keys) == tokens else torch.tensor(keys),
        _longest(query_starts),
        _longest(key_starts),
    )


def _longest(starts: Sequence[int]) -> int:
    """The length of the longest span, from the starts of all and the end."""
    return max(end - start for start, end in pairwise(starts))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
