"""Laws of attention plans: the blocks of a row, put together, are exactly the T x T mask that the row defines."""

from collections.abc import Iterable
from functools import partial
from itertools import pairwise, product

import pytest
import torch

from atomtune.batch import blocks as blocks_module
from atomtune.batch.attention_plan import AttentionPlan, padded_length, plan_attention, visible
from atomtune.batch.blocks import Block, Blocks, Places
from atomtune.batch.pack import pack
from atomtune.batch.row import Row, single
from atomtune.batch.tree import graft
from atomtune.data.records import Example
from tests.batch.test_tree import forest

WINDOWS = (None, 1, 2, 5, 17, 40)


def rows(number: int, *, longest: int) -> list[Row]:
    """Rows of random records in turn: trees that share all, trees that share only what pays, packed rows."""
    layouts = [partial(graft, least_saved=1), graft, pack]
    return [layouts[seed % 3](forest(seed, longest=longest)) for seed in range(number)]


def held_slots(blocks: Blocks) -> torch.Tensor:
    """[S] bool: the query slots with a token of the row; the others are padding."""
    held = torch.zeros(len(blocks.query_tokens), dtype=torch.bool)
    held[blocks.slot_of] = True
    return held


def counted(plan: AttentionPlan, window: int | None) -> torch.Tensor:
    """[T, T]: how often each query meets each key, computed from the blocks only."""
    tokens = len(plan.until)
    met = torch.zeros(tokens, tokens, dtype=torch.long)
    blocks = plan.blocks[window]
    for block in blocks.each:
        of_queries = slice(block.first_query, block.first_query + block.count * block.queries)
        of_keys = slice(block.first_key, block.first_key + block.count * block.keys)
        queries, keys = blocks.query_tokens[of_queries], blocks.key_tokens[of_keys].view(block.count, 1, -1)
        assert (keys[..., : block.seen_by_all] >= 0).all(), "every query of a chunk sees a key that is not there"
        by_all = torch.ones(block.count, block.queries, block.seen_by_all, dtype=torch.bool)
        seen = torch.cat([by_all, block.seen], -1)
        assert seen.any(-1).all(), "a query that sees nothing has no softmax"
        seen &= held_slots(blocks)[of_queries].view(block.count, -1, 1)
        assert (keys.expand_as(seen)[seen] >= 0).all()
        each = (queries.view(block.count, -1, 1).expand_as(seen)[seen], keys.expand_as(seen)[seen])
        met.index_put_(each, torch.ones(len(each[0]), dtype=torch.long), accumulate=True)
    return met


def assert_same_sight(row: Row, window: int | None, width: int | None = None) -> None:
    """Every query meets each of its visible keys exactly once and no other key; padding takes no part."""
    plan = plan_attention(row, windows=(window,), width=width)
    law = visible(torch.tensor(row.until), torch.tensor(row.positions()), window=window).long()
    met = counted(plan, window)
    assert torch.equal(met[: len(row), : len(row)], law)
    assert met.sum() == law.sum(), "padding takes part"


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", [(1,), (3,), (5, 9), blocks_module.CHUNK_SIZES], ids=str)
def test_blocks_together_cover_exactly_the_attention_mask(monkeypatch, window, sizes):
    # Catches a key counted twice (in the path and in the chunk), a missing key, a sibling's key, a window off by one.
    monkeypatch.setattr(blocks_module, "CHUNK_SIZES", sizes)
    for row in rows(120, longest=14):
        assert_same_sight(row, window)
    for row in rows(40, longest=60):
        assert_same_sight(row, window, padded_length(len(row)))


def seen_by_spans(plan: AttentionPlan, window: int | None) -> torch.Tensor:
    """[T, T]: how often each query meets each key, computed from the spans only."""
    tokens, spans = len(plan.until), plan.spans[window]
    keys = torch.arange(tokens) if spans.keys is None else spans.keys
    queries, begins = spans.query_starts.tolist(), spans.key_starts.tolist()
    assert (queries[0], queries[-1], begins[0], begins[-1]) == (0, tokens, 0, len(keys))
    met = torch.zeros(tokens, tokens, dtype=torch.long)
    for number in range(len(queries) - 1):
        segment = range(queries[number], queries[number + 1])
        own = keys[begins[number] : begins[number + 1]].tolist()
        assert len(segment) <= spans.longest_queries
        assert len(own) <= spans.longest_keys
        for back, query in enumerate(reversed(segment)):  # causal, aligned at the lower right corner
            ahead = own[: len(own) - back]
            for key in ahead if window is None else ahead[-window:]:
                met[query, key] += 1
    return met


@pytest.mark.parametrize("window", WINDOWS)
def test_spans_together_cover_exactly_the_attention_mask(window):
    # Catches a path too short for its window, a segment that sees a sibling, and keys shifted by one.
    for row in rows(60, longest=14) + rows(30, longest=60):
        plan = plan_attention(row, windows=(None, window), width=padded_length(len(row)), cut="spans")
        law = visible(torch.tensor(row.until), torch.tensor(row.positions()), window=window).long()
        met = seen_by_spans(plan, window)
        assert torch.equal(met[: len(row), : len(row)], law)
        assert not met[: len(row), len(row) :].any()
        assert not met[len(row) :, : len(row)].any()
        assert met.sum(1).all(), "a query that sees nothing has no softmax"


def test_a_packed_row_gathers_no_keys():
    row = pack(forest(3, longest=40))
    assert plan_attention(row, cut="spans", width=padded_length(len(row))).spans[None].keys is None


def test_a_window_covering_every_path_reuses_the_full_attention_blocks():
    row = rows(1, longest=14)[0]
    deepest = max(row.positions()) + 1
    plan = plan_attention(row, windows=(None, deepest, deepest - 1))
    assert plan.blocks[deepest] is plan.blocks[None]
    assert plan.blocks[deepest - 1] is not plan.blocks[None]


@pytest.mark.parametrize("window", WINDOWS)
def test_every_token_has_one_query_slot_and_padding_none(monkeypatch, window):
    # Catches a token whose output comes from a padded slot, and a gradient that is passed on twice.
    monkeypatch.setattr(blocks_module, "CHUNK_SIZES", (7,))
    for row in rows(60, longest=40):
        plan = plan_attention(row, windows=(window,), width=padded_length(len(row)))
        blocks = plan.blocks[window]
        assert sorted(blocks.query_tokens[held_slots(blocks)].tolist()) == list(range(len(row)))
        assert blocks.query_tokens[blocks.slot_of].tolist() == list(range(len(row)))
        assert blocks.query_tokens.max() < len(row)
        assert blocks.key_tokens.max() < len(row)
        for first, size, end in (
            ("first_query", "queries", len(blocks.query_tokens)),
            ("first_key", "keys", len(blocks.key_tokens)),
        ):
            firsts = [getattr(block, first) for block in blocks.each]
            ends = [getattr(block, first) + block.count * getattr(block, size) for block in blocks.each]
            assert firsts == [0, *ends[:-1]]
            assert ends[-1] == end


def test_block_sizes_are_multiples_of_16_queries_and_32_keys():
    for row in rows(60, longest=60):
        for block in plan_attention(row).blocks[None].each:
            assert block.queries % 16 == 0
            assert block.keys % 32 == 0


@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (6, 2), (4, 1)])
def test_gather_indices_address_the_right_token_of_every_head(monkeypatch, heads, key_heads):
    # Catches heads, chunks and tokens swapped in a gather, which no shape check would show.
    monkeypatch.setattr(blocks_module, "CHUNK_SIZES", (7,))
    group = heads // key_heads
    for row in rows(40, longest=40):
        width = padded_length(len(row))
        blocks = plan_attention(row, width=width).blocks[None]
        places = blocks.places(heads, key_heads)
        # Row h + heads * t of the tokens is token t of head h.
        assert places.queries[places.back].tolist() == list(range(heads * len(row)))
        query = key = 0
        slots: list[tuple[int, int]] = []  # the token and key head of each row of the keys; -1 for padding
        for block in blocks.each:
            for chunk in range(block.count):
                first = block.first_query + chunk * block.queries
                asked = blocks.query_tokens[first : first + block.queries]
                held = held_slots(blocks)[first : first + block.queries]
                first = block.first_key + chunk * block.keys
                seen = blocks.key_tokens[first : first + block.keys]
                for head in range(heads):
                    assert torch.equal(places.queries[query : query + block.queries], asked * heads + head)
                    assert torch.equal(places.holds[query : query + block.queries, 0], held)
                    of_head = seen.clamp(min=0) * key_heads + head // group
                    assert torch.equal(places.keys[key : key + block.keys], of_head)
                    slots += [(token, head // group) for token in seen.tolist()]
                    query, key = query + block.queries, key + block.keys
        assert (query, key) == (len(places.queries), len(places.keys))
        copies, starts = places.copies.tolist(), places.copy_starts.tolist()
        assert sorted(copies) == [number for number, (token, _) in enumerate(slots) if token >= 0]
        assert len(starts) == width * key_heads + 1
        for bag, (start, end) in enumerate(pairwise(starts)):
            assert {slots[copy] for copy in copies[start:end]} <= {divmod(bag, key_heads)}
        assert starts[-1] == len(copies)


def test_places_are_those_of_the_example_in_their_docstring():
    block = Block(count=2, queries=2, keys=2, first_query=0, first_key=0, seen_by_all=2, seen=torch.empty(2, 2, 0))
    blocks = Blocks(
        (block,),
        query_tokens=torch.tensor([0, 1, 2, 2]),
        slot_of=torch.tensor([0, 1, 2]),
        key_tokens=torch.tensor([0, 1, 0, 2]),
        key_slots=torch.tensor([0, 2, 1, 3]),
        key_starts=torch.tensor([0, 2, 3, 4]),
    )
    drawn = [line.split() for line in str(Places.__doc__).splitlines()]
    for name, count in {"queries": 8, "holds": 8, "back": 6, "keys": 8, "copies": 8, "copy_starts": 4}.items():
        words = next(line for line in drawn if line[:1] == [name] and line[1][0] in "01")
        numbers = [word.replace(".", "0") for word in words[1:] if word != "|"][:count]
        assert getattr(blocks.places(2, 1), name).flatten().tolist() == list(map(int, numbers)), name


def test_padding_attends_only_to_padding():
    # A query that sees nothing would be 0 / 0 in a dense softmax.
    row = rows(1, longest=14)[0]
    plan = plan_attention(row, windows=(None, 2), width=padded_length(len(row)))
    for window in (None, 2):
        seen = plan.visible(window)[0, 0]
        assert seen.any(1).all()
        assert not seen[: len(row), len(row) :].any()
        assert not seen[len(row) :, : len(row)].any()


def some_record(tokens: int, origin: str = "train.jsonl:1", last: int = 1) -> Example:
    return Example((*(i % 7 for i in range(tokens - 1)), last), (0,) * tokens, origin)


@pytest.mark.parametrize("window", [None, 300])
def test_long_trunks_and_long_branches_are_computed_in_short_chunks(window):
    # One chunk for a long segment would need tokens² scores of memory.
    trunk = some_record(900).ids
    examples = [
        Example((*trunk, *(50 + n for _ in range(length))), (0,) * (900 + length), f"train.jsonl:{n}")
        for n, length in enumerate([500, 20, 21, 390])
    ]
    row = graft(examples)
    assert len(row) == 900 + 500 + 20 + 21 + 390
    plan = plan_attention(row, windows=(window,))
    assert max(block.queries for block in plan.blocks[window].each) <= max(blocks_module.CHUNK_SIZES)
    assert_same_sight(row, window)


def test_keys_visible_to_a_whole_block_need_no_mask():
    # A mask of queries x keys for a long record would take more memory than its scores.
    row = single(some_record(2_000))
    for block in plan_attention(row).blocks[None].each:
        assert block.seen.shape[-1] <= block.queries + 32 * block.count
    trunk = tuple(range(300))
    examples = [Example((*trunk, 500 + n, 1, 2), (0,) * 303, f"train.jsonl:{n}") for n in range(40)]
    assert max(block.seen_by_all for block in plan_attention(graft(examples)).blocks[None].each) >= 256


@pytest.mark.parametrize("window", [None, 512])
def test_a_block_of_many_chunks_fits_the_cache(window):
    # With 16 heads of 128, larger blocks took up to 1.6 times as long (docs/log.md).
    row = single(some_record(3_000))
    blocks = plan_attention(row, windows=(window,)).blocks[window].each
    assert any(block.count > 1 for block in plan_attention(row, windows=(512,)).blocks[512].each)
    assert all(block.count == 1 or block.scores <= 1 << 18 for block in blocks)


def cost_of(sizes: Iterable[tuple[int, int, int]]) -> int:
    """The cost of blocks with these numbers of (chunks, queries, keys), in scores of one head."""
    block, key = blocks_module._BLOCK_PAIRS, blocks_module._KEY_PAIRS
    return sum(block + chunks * keys * (queries + key) for chunks, queries, keys in sizes)


def cost_of_plan(row: Row) -> int:
    return cost_of((block.count, block.queries, block.keys) for block in plan_attention(row).blocks[None].each)


def lowest_cost(row: Row, size: int) -> int:
    """The lowest cost of all ways to stack chunks of this size that are neighbours when sorted by their sizes."""
    starts, positions = range(0, len(row), size), row.positions()
    lengths = [min(size, len(row) - start) for start in starts]
    sizes = [
        (-(-(positions[start] + length) // 32) * 32, -(-length // 16) * 16)
        for start, length in zip(starts, lengths, strict=True)
    ]  # keys, queries
    sizes.sort()
    costs = []
    for is_cut in product([False, True], repeat=len(sizes) - 1):
        ends = [end for end, cut in enumerate(is_cut, start=1) if cut]
        stacks = [sizes[start:end] for start, end in pairwise([0, *ends, len(sizes)])]
        costs.append(cost_of((len(s), max(q for _, q in s), max(k for k, _ in s)) for s in stacks))
    return min(costs)


def test_chunks_are_cut_and_stacked_at_the_lowest_cost(monkeypatch):
    # A dearer plan gives the same attention, only slower.
    stacked = 0
    for seed in range(14):
        row = graft(forest(seed, longest=300), least_saved=(1, 100)[seed % 2])
        if len(row) > 48 * 10:  # too many ways to stack its chunks
            continue
        costs = []
        for size in (48, 64, 160):
            monkeypatch.setattr(blocks_module, "CHUNK_SIZES", (size,))
            costs.append(cost_of_plan(row))
            assert costs[-1] == lowest_cost(row, size)
        monkeypatch.setattr(blocks_module, "CHUNK_SIZES", (48, 64, 160))
        assert cost_of_plan(row) == min(costs)
        stacked += len(plan_attention(row).blocks[None].each) > 1
    assert stacked > 2, "more than one block is rarely best"


def test_a_very_long_row_is_planned_with_few_chunks():
    row = single(some_record(20_000))
    blocks = plan_attention(row).blocks[None]
    assert sum(block.count for block in blocks.each) == -(-20_000 // max(blocks_module.CHUNK_SIZES))


def test_rows_are_padded_slightly_to_one_of_a_few_lengths():
    lengths = [padded_length(tokens) for tokens in range(1, 5_000)]
    for tokens, padded in enumerate(lengths, start=1):
        assert tokens <= padded < tokens + max(16, tokens / 16)
        assert padded % 16 == 0
        assert padded_length(padded) == padded, "padding a padded row changes it"
    assert lengths == sorted(lengths)
    assert len({padded for padded in lengths if padded >= 256}) <= 16 * 5  # five doublings of the length
