"""Blocks: a row's attention as a few dense matrix products, which are fast on a CPU.

A row is cut into chunks of consecutive tokens. In depth-first order, the queries of a chunk see only the path above its
first token and the chunk itself. Chunks of similar size are stacked in a block, padded to one size. Derivation:
docs/geometry.md.
Letters: T tokens in the row; C chunks of a block, n query slots and m key slots in each; S query slots and K key slots
in all blocks; H heads, H' key and value heads.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atomtune.batch.paths import Stretch, last_of, path_to, split_at
from atomtune.batch.row import Row, Segment

#: Sizes of chunks that are tried, in tokens. Small ones compute fewer masked scores, large ones gather fewer keys.
CHUNK_SIZES = (64, 96, 128, 192, 256)
#: A size that would give more chunks than this is not tried, except the largest, so that planning stays short.
_MOST_CHUNKS = 128
#: Costs of a block and of a key slot, in scores (query-key pairs): measured on a layer's attention with 8 heads of 64
#: (docs/log.md).
_BLOCK_PAIRS, _KEY_PAIRS = 17_000, 40
#: Scores of a head in a block of several chunks, at most: larger tensors leave the cache, and new memory is slow.
_MOST_PAIRS = 1 << 18
#: Numbers of query slots and of key slots are multiples of these. A CPU's matrix library compiles a kernel for every
#: new shape, and its bfloat16 softmax is six times slower if the keys are not a multiple of 32 (docs/log.md).
QUERY_STEP, KEY_STEP = 16, 32


@dataclass(frozen=True, slots=True)
class Block:
    """C chunks, padded on the right to n queries and m keys each.

    count         C
    queries       n
    keys          m
    first_query   its first query slot; the block has the slots first_query .. first_query + C * n (exclusive)
    first_key     its first key slot
    seen_by_all   how many leading keys every query of its chunk sees
    seen          [C, n, m - seen_by_all] bool, whether a query sees each of the other keys

    The chunks (b0 b1 b2) and (b3 c0) of a row p0 p1 b0 b1 b2 b3 c0, in which p has the branches b and c; C = 2, n = 3,
    m = 6 (without rounding), seen_by_all = 2:

        slot   query   keys  p0 p1 b0 b1 b2 --         slot   query   keys  p0 p1 b0 b1 b2 b3 c0
         0      b0            1  1  1  .  .  .          3      b3            1  1  1  1  1  1  .
         1      b1            1  1  1  1  .  .          4      c0            1  1  .  .  .  .  1
         2      b2            1  1  1  1  1  .          5      -- (c0)       1  1  .  .  .  .  1

    A padded query repeats the last one, so that its softmax is not NaN; its output is not used.
    """

    count: int
    queries: int
    keys: int
    first_query: int
    first_key: int
    seen_by_all: int
    seen: torch.Tensor

    @property
    def scores(self) -> int:
        """The number of scores that one head computes for this block."""
        return self.count * self.queries * self.keys


@dataclass(frozen=True, slots=True)
class Places:
    """Indices between tokens and slots for each head; a (token, head) or (slot, head) is one row of D numbers.

    In memory the tokens' rows are ordered by token, then head; the slots' rows by chunk, then head, then slot.

    queries     [H * S]  for each query (slot, head), its row in the tokens' [T * H, D]
    holds       [H * S, 1]  bool, False for padded queries
    back        [t * H]  for each (token, head), its row in the queries' [H * S, D]; t tokens, without the row's padding
    keys        [H * K]  for each key (slot, head), its row in the tokens' [T * H', D]
    copies      rows in the keys' [H * K, D], grouped by (token, key head): all slots and heads that read it
    copy_starts [T * H' + 1]  where each group begins in `copies`

    The chunks (p b) and (c) of a row p b c, in which p has the branches b and c; H = 2, H' = 1, n = m = 2 (without
    rounding). The tokens' rows are p0 p1 b0 b1 c0 c1 (p1 is token p for head 1), and p b c for keys:

        row              0   1   2   3   4   5   6   7
        of the queries   p0  b0  p1  b1  c0  --  c1  --
        queries          0   2   1   3   4   4   5   5
        holds            1   1   1   1   1   .   1   .
        back             0   2   1   3   4   6             where p0 p1 b0 b1 c0 c1 are
        of the keys      p   b   p   b   p   c   p   c     for head 0, head 1, head 0, head 1
        keys             0   1   0   1   0   2   0   2
        copies           0   2   4   6 | 1   3 | 5   7     where p, b and c are
        copy_starts      0               4       6       8
    """

    queries: torch.Tensor
    holds: torch.Tensor
    back: torch.Tensor
    keys: torch.Tensor
    copies: torch.Tensor
    copy_starts: torch.Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """All blocks of a row, and the tokens in their slots.

    query_tokens  [S]  the token in each query slot; padding repeats a token
    slot_of       [t]  the query slot of each token, without the row's padding
    key_tokens    [K]  the token in each key slot; -1 for padding
    key_slots     [N]  the N key slots that are not padding, grouped by token
    key_starts    [T + 1]  where each token's group begins in `key_slots`; padding has no slots
    """

    each: tuple[Block, ...]
    query_tokens: torch.Tensor
    slot_of: torch.Tensor
    key_tokens: torch.Tensor
    key_slots: torch.Tensor
    key_starts: torch.Tensor

    def places(self, heads: int, key_heads: int) -> Places:
        """The places of each head's slots.

        heads, key_heads  H and H'; H is a multiple of H'
        """
        head = torch.arange(heads, device=self.query_tokens.device)
        key_head = head // (heads // key_heads)
        query_sizes = [(block.count, block.queries) for block in self.each]
        key_sizes = [(block.count, block.keys) for block in self.each]
        queries = _by_row(self.query_tokens * heads, head, query_sizes)
        keys = _by_row(self.key_tokens.clamp(min=0) * key_heads, key_head, key_sizes)
        back = _rows(query_sizes, head)[self.slot_of].flatten()
        holds = torch.zeros(len(queries), 1, dtype=torch.bool, device=head.device).index_fill_(0, back, value=True)
        copies, copy_starts = self._copies(_rows(key_sizes, head), key_heads)
        return Places(queries, holds, back, keys, copies, copy_starts)

    def _copies(self, key_rows: torch.Tensor, key_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places.copies and copy_starts.

        key_rows  [K, H]  the row of each (key slot, head)
        In `copies`, a token in r slots has r * H rows. They are r * H / H' for each key head in turn, ordered by slot
        and then by head.
        """
        device, heads = key_rows.device, key_rows.shape[1]
        shared_by = heads // key_heads  # H / H', the heads with one key head; they are adjacent
        of_key_head = self.key_starts.diff() * shared_by  # [T] rows of each key head of a token
        token_starts = self.key_starts * heads  # [T + 1]
        key_head = torch.arange(key_heads, device=device)
        group_starts = token_starts[:-1, None] + key_head * of_key_head[:, None]  # [T, H']

        token = self.key_tokens[self.key_slots]  # [N]
        rank = torch.arange(len(token), device=device) - self.key_starts[token]  # [N] of a slot among its token's
        in_group = rank[:, None] * shared_by + torch.arange(shared_by, device=device)  # [N, H / H']
        place = group_starts[token][..., None] + in_group[:, None]  # [N, H', H / H'], where each row goes
        rows = key_rows[self.key_slots]  # [N, H]
        copies = torch.empty_like(rows).flatten().index_copy_(0, place.flatten(), rows.flatten())
        return copies, torch.cat([group_starts.flatten(), token_starts[-1:]])


def _by_row(of_slot: torch.Tensor, of_head: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """[S] and [H] → their sums for each (slot, head), [H * S] in the order of the rows: by chunk, head and slot.

    sizes  (C, n) of each block
    """
    of_blocks = torch.split(of_slot, [chunks * slots for chunks, slots in sizes])
    sums: list[torch.Tensor] = []
    for of_block, (chunks, slots) in zip(of_blocks, sizes, strict=True):
        of_rows = of_block.view(chunks, 1, slots) + of_head[:, None]  # [C, H, n]
        sums.append(of_rows.flatten())
    return torch.cat(sums)


def _rows(sizes: Sequence[tuple[int, int]], head: torch.Tensor) -> torch.Tensor:
    """[S, H]: the row of each (slot, head) in the order of `_by_row`.

    sizes  (C, n) of each block
    head   [H] 0 .. H - 1
    """
    heads, first = len(head), 0
    by_slot: list[torch.Tensor] = []
    for chunks, slots in sizes:
        end = first + chunks * heads * slots
        rows = torch.arange(first, end, device=head.device).view(chunks, heads, slots)
        by_slot.append(rows.transpose(1, 2).reshape(-1, heads))  # [C * n, H]
        first = end
    return torch.cat(by_slot)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tokens start .. end (exclusive), and how many tokens of the path above `start` their queries need."""

    start: int
    end: int
    above: int

    @property
    def queries(self) -> int:
        """Query slots, rounded up."""
        return _rounded(self.end - self.start, QUERY_STEP)

    @property
    def keys(self) -> int:
        """Key slots, rounded up."""
        return _rounded(self.above + self.end - self.start, KEY_STEP)


def cut_into_blocks(
    row: Row, positions: Sequence[int], parts: Sequence[Segment], window: int | None, width: int
) -> Blocks:
    """The blocks of a row.

    positions  of its tokens
    parts      its segments
    window     the sliding window of the layer, or None
    width      T, padding included
    """
    cuts = [
        _stacked(_cut_into_chunks(positions, size, window))
        for size in CHUNK_SIZES
        if size == CHUNK_SIZES[-1] or len(row) <= size * _MOST_CHUNKS
    ]
    _, stacks = min(cuts, key=lambda cut: cut[0])
    slots = _Slots(row, positions, parts, window)
    for chunks in stacks:
        slots.add_block(chunks)
    return slots.blocks(width)


class _Slots:
    """The tokens in all slots of a row, while its blocks are added."""

    def __init__(self, row: Row, positions: Sequence[int], parts: Sequence[Segment], window: int | None) -> None:
        self.row, self.positions, self.parts, self.window = row, positions, parts, window
        self._tokens = torch.arange(len(row))
        self._until, self._position = torch.tensor(row.until), torch.tensor(positions)
        self._slot_of = torch.empty_like(self._tokens)
        self._queries: list[torch.Tensor] = []  # of each block, [C * n]
        self._keys: list[torch.Tensor] = []  # [C * m]
        self._blocks: list[Block] = []

    def add_block(self, chunks: Sequence[_Chunk]) -> None:
        """Add a block of these chunks.

        query slots of a chunk   its tokens, then padding: the last token again
        key slots of a chunk     the path above it, what all queries have in their window first; its tokens; padding: -1
        """
        count = len(chunks)
        queries = max(chunk.queries for chunk in chunks)
        keys = max(chunk.keys for chunk in chunks)
        first_query = sum(map(len, self._queries))
        first_key = sum(map(len, self._keys))
        starts = torch.tensor([[chunk.start] for chunk in chunks])  # [C, 1]
        lasts = torch.tensor([[chunk.end - 1] for chunk in chunks])  # [C, 1]
        query_tokens = torch.minimum(starts + torch.arange(queries), lasts)  # [C, n]
        key_tokens = torch.full((count, keys), -1)  # [C, m]
        seen_by_all = keys
        for number, chunk in enumerate(chunks):
            own, first = chunk.end - chunk.start, first_query + number * queries
            self._slot_of[chunk.start : chunk.end] = torch.arange(first, first + own)
            in_all_windows, in_some_windows = self._path(chunk)
            read = [*in_all_windows, *in_some_windows, (chunk.start, chunk.end)]
            torch.cat([self._tokens[start:end] for start, end in read], out=key_tokens[number, : chunk.above + own])
            seen_by_all = min(seen_by_all, _seen_by_all(self.row.until, chunk, in_all_windows))
        self._queries.append(query_tokens.flatten())
        self._keys.append(key_tokens.flatten())
        seen = self._seen(query_tokens[..., None], key_tokens[:, None, seen_by_all:])  # [C, n, m - seen_by_all]
        self._blocks.append(Block(count, queries, keys, first_query, first_key, seen_by_all, seen))

    def _path(self, chunk: _Chunk) -> tuple[list[Stretch], list[Stretch]]:
        """The path that a chunk's queries need: what is in every query's window, and what is not."""
        path = _above(self.parts, chunk)
        if self.window is None:
            return path, []
        deepest = max(self.positions[chunk.start : chunk.end])
        first_position = self.positions[chunk.start] - chunk.above  # of the path that is needed
        first_in_all_windows = deepest - self.window + 1
        in_some_windows, in_all_windows = split_at(path, first_in_all_windows - first_position)
        return in_all_windows, in_some_windows

    def _seen(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether tokens see keys, of which -1 is padding: the law of row.py."""
        seen = (key >= 0) & (key <= query) & (query < self._until[key])
        return seen if self.window is None else seen & (self._position[query] - self._position[key] < self.window)

    def blocks(self, width: int) -> Blocks:
        queries, keys = torch.cat(self._queries), torch.cat(self._keys)
        numbers = torch.bincount(keys + 1, minlength=width + 1)  # [1 + T] slots of padding, then of each token
        padding = int(numbers[0])
        key_slots, key_starts = keys.argsort(stable=True)[padding:], numbers.cumsum(0) - padding
        return Blocks(tuple(self._blocks), queries, self._slot_of, keys, key_slots, key_starts)


def _cut_into_chunks(positions: Sequence[int], size: int, window: int | None) -> list[_Chunk]:
    """Chunks of `size` tokens and, at the end of the row, one of at most that."""
    chunks: list[_Chunk] = []
    for start in range(0, len(positions), size):
        end = min(start + size, len(positions))
        above = positions[start]
        if window is not None:  # the query nearest to the root sees the path furthest up
            above = min(above, above - min(positions[start:end]) + window - 1)
        chunks.append(_Chunk(start, end, above))
    return chunks


def _stacked(chunks: Sequence[_Chunk]) -> tuple[float, list[list[_Chunk]]]:
    """(cost in scores, chunks by block): the cheapest way to stack chunks, padding and number of blocks together.

    Exact for blocks of neighbours in the list sorted by keys, by dynamic programming over its beginnings.
    """
    by_keys = sorted(chunks, key=lambda chunk: (chunk.keys, chunk.queries, chunk.start))
    sizes = [(chunk.keys, chunk.queries) for chunk in by_keys]
    least_cost, last_cut = [0.0], [0]  # at index `end`: for the first `end` chunks
    for end, (keys, _) in enumerate(sizes, start=1):
        best, cut, queries = float("inf"), 0, 0
        for start in reversed(range(end)):
            queries = max(queries, sizes[start][1])
            if start < end - 1 and (end - start) * keys * queries > _MOST_PAIRS:
                break
            cost = least_cost[start] + _BLOCK_PAIRS + (end - start) * keys * (queries + _KEY_PAIRS)
            if cost < best:
                best, cut = cost, start
        least_cost.append(best)
        last_cut.append(cut)
    stacks: list[list[_Chunk]] = []
    end = len(by_keys)
    while end:
        stacks.append(sorted(by_keys[last_cut[end] : end], key=lambda chunk: chunk.start))
        end = last_cut[end]
    return least_cost[-1], stacks


def _above(parts: Sequence[Segment], chunk: _Chunk) -> list[Stretch]:
    """The stretches of the path above a chunk's first token that its queries need."""
    number = bisect_right(parts, chunk.start, key=lambda part: part.start) - 1
    path = path_to(parts, parts[number].parent)
    return last_of([*path, (parts[number].start, chunk.start)], chunk.above)


def _seen_by_all(until: Sequence[int], chunk: _Chunk, path: Sequence[Stretch]) -> int:
    """How many of the path's leading tokens every query of the chunk sees."""
    count = 0
    for start, end in path:  # subtrees end no later the further down a path
        count += bisect_right(range(start, end), -chunk.end, key=lambda token: -until[token])
    return count


def _rounded(number: int, step: int) -> int:
    return -(-number // step) * step
