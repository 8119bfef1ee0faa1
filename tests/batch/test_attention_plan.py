"""Laws of attention plans: the blocks of a row, put together, are exactly the T x T mask that the row defines."""

from functools import partial

import pytest
import torch

from atomtune.batch import attention_plan
from atomtune.batch.attention_plan import AttentionPlan, padded_length, plan_attention, visible
from atomtune.batch.blocks import Siblings, _mask
from atomtune.batch.pack import pack
from atomtune.batch.row import Row, segments, single
from atomtune.batch.tree import graft
from atomtune.data.records import Example
from tests.batch.test_tree import forest

WINDOWS = (None, 1, 2, 5, 17, 40)


def rows(number: int, *, longest: int) -> list[Row]:
    """Rows of random records in turn: trees that share all, trees that share only what pays, packed rows."""
    layouts = [partial(graft, least_saved=1), graft, pack]
    return [layouts[seed % 3](forest(seed, longest=longest)) for seed in range(number)]


def keys_above(siblings: Siblings) -> torch.Tensor:
    """Indices of the path tokens that these blocks use as keys."""
    if siblings.path is None:
        return torch.tensor([], dtype=torch.long)
    if isinstance(siblings.path, torch.Tensor):
        return siblings.path
    return torch.arange(siblings.path.start, siblings.path.stop)


def counted(plan: AttentionPlan, window: int | None) -> torch.Tensor:
    """[T, T]: how often each query meets each key, computed from the blocks only."""
    tokens = len(plan.until)
    met = torch.zeros(tokens, tokens, dtype=torch.long)
    blocks = plan.blocks[window]
    for siblings in blocks.each:
        above = keys_above(siblings)
        for block in siblings.blocks:
            span = slice(block.first, block.first + block.count * block.width)
            own, holds = blocks.slots[span].view(block.count, -1), blocks.holds[span].view(block.count, -1)
            assert len(above) >= block.path_keys, "a block multiplies more of the path than is there"
            seen = torch.zeros(block.width, block.path_keys + block.width, dtype=torch.bool)
            seen[:, block.path_keys :] = block.mask[:, -block.width :] == 0
            cut = block.mask.shape[1] > block.width  # the window hides a part of the path
            seen[:, : siblings.path_tokens] = block.mask[:, : siblings.path_tokens] == 0 if cut else True
            assert block.mask.shape[1] == block.width + (siblings.path_tokens if cut else 0)
            assert seen.any(1).all(), "a query that sees nothing has no softmax"
            for tokens_in, real in zip(own, holds, strict=True):
                keys = torch.cat([above[: block.path_keys], tokens_in])
                assert real[: int(real.sum())].all(), "padding stands on the right"
                each = (tokens_in[real, None].expand(-1, len(keys)), keys.expand(int(real.sum()), -1))
                met.index_put_(each, seen[real].long(), accumulate=True)
    return met


def assert_same_sight(row: Row, window: int | None, width: int | None = None) -> None:
    """Every query meets each of its visible keys exactly once and no other key; padding takes no part."""
    plan = plan_attention(row, windows=(window,), width=width)
    law = visible(torch.tensor(row.until), torch.tensor(row.positions()), window=window).long()
    met = counted(plan, window)
    assert torch.equal(met[: len(row), : len(row)], law)
    assert met.sum() == law.sum(), "padding takes part"


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("longest_segment", [3, 256])
def test_the_blocks_together_are_the_law(monkeypatch, window, longest_segment):
    # Catches a key counted twice (in the path and in the segment), a missing key, a sibling's key, a window off by one.
    monkeypatch.setattr(attention_plan, "LONGEST_SEGMENT", longest_segment)
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
def test_the_spans_together_are_the_law(window):
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


def test_a_window_that_reaches_the_start_of_every_path_costs_no_blocks_of_its_own():
    row = rows(1, longest=14)[0]
    deepest = max(row.positions()) + 1
    plan = plan_attention(row, windows=(None, deepest, deepest - 1))
    assert plan.blocks[deepest] is plan.blocks[None]
    assert plan.blocks[deepest - 1] is not plan.blocks[None]


@pytest.mark.parametrize("window", WINDOWS)
def test_every_token_is_asked_once_and_padding_never(window):
    # Catches a token whose output comes from a padded slot, and a gradient that is passed on twice.
    for row in rows(60, longest=40):
        plan = plan_attention(row, windows=(window,), width=padded_length(len(row)))
        blocks = plan.blocks[window]
        assert plan.real == len(row)
        assert sorted(blocks.slots[blocks.holds].tolist()) == list(range(len(row)))
        assert blocks.slots[blocks.slot_of].tolist() == list(range(len(row)))
        assert blocks.holds[blocks.slot_of].all()
        assert blocks.slots.max() < len(row)
        sizes = [(b.first, b.count * b.width) for siblings in blocks.each for b in siblings.blocks]
        ends = [first + size for first, size in sizes]
        assert [first for first, _ in sizes] == [0, *ends[:-1]]
        assert ends[-1] == len(blocks.slots)


def test_the_path_reaches_into_no_token_that_is_not_there():
    # Keys that fill a path up to a multiple of 32 must exist: they are read, although no query sees them.
    for row in rows(200, longest=40):
        for width in (len(row), padded_length(len(row))):
            for siblings in plan_attention(row, windows=(5,), width=width).blocks[5].each:
                keys = keys_above(siblings)
                assert ((keys >= 0) & (keys < width)).all()
                for block in siblings.blocks:
                    assert block.width % 16 == 0
                    assert not siblings.path_tokens or (block.path_keys + block.width) % 32 == 0


def test_every_head_finds_its_slots():
    # Catches heads and tokens swapped in a gather, which no shape check would show.
    heads = 3
    for row in rows(40, longest=40):
        blocks = plan_attention(row).blocks[None]
        places = blocks.by_head(heads)
        assert places.gather[places.back].tolist() == list(range(heads * len(row)))  # token t of head h: 3 * t + h
        token, head = places.gather // heads, places.gather % heads
        for block in (block for siblings in blocks.each for block in siblings.blocks):
            size = block.count * block.width
            span = slice(heads * block.first, heads * (block.first + size))
            for h, (tokens_in, same, holds) in enumerate(
                zip(
                    token[span].view(heads, size),
                    head[span].view(heads, size),
                    places.holds[span].view(heads, size),
                    strict=True,
                )
            ):
                assert (same == h).all()
                assert torch.equal(tokens_in, blocks.slots[block.first : block.first + size])
                assert torch.equal(holds, blocks.holds[block.first : block.first + size])


def test_padding_sees_padding():
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


@pytest.mark.parametrize("tokens", [256, 257, 512, 513, 1_000])
def test_a_long_record_is_cut_into_a_chain_of_about_equal_parts(tokens):
    row = single(some_record(tokens))
    parts = segments(row, longest=attention_plan.LONGEST_SEGMENT)
    assert [part.parent for part in parts] == list(range(-1, len(parts) - 1))
    assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
    lengths = [len(part) for part in parts]
    assert len(parts) == -(-tokens // attention_plan.LONGEST_SEGMENT)
    assert sum(lengths) == tokens
    assert max(lengths) <= attention_plan.LONGEST_SEGMENT
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("window", [None, 300])
def test_long_trunks_and_long_branches_are_computed_in_short_blocks(window):
    # One block for a long segment would need tokens² scores of memory.
    trunk = some_record(900).ids
    examples = [
        Example((*trunk, *(50 + n for _ in range(length))), (0,) * (900 + length), f"train.jsonl:{n}")
        for n, length in enumerate([500, 20, 21, 390])
    ]
    row = graft(examples)
    assert len(row) == 900 + 500 + 20 + 21 + 390
    plan = plan_attention(row, windows=(window,))
    widths = [block.width for siblings in plan.blocks[window].each for block in siblings.blocks]
    assert max(widths) <= attention_plan.LONGEST_SEGMENT
    assert_same_sight(row, window)


def test_equal_branches_share_a_block():
    # Catches one block per record, which costs more than sharing saves.
    trunk = tuple(range(40))
    examples = [Example((*trunk, 50 + n, 1, 2), (0,) * 43, f"train.jsonl:{n}") for n in range(12)]
    blocks = plan_attention(graft(examples)).blocks[None]
    assert [[block.count for block in siblings.blocks] for siblings in blocks.each] == [[1], [12]]


def test_rows_are_padded_to_few_lengths_a_little_longer():
    lengths = [padded_length(tokens) for tokens in range(1, 5_000)]
    for tokens, padded in enumerate(lengths, start=1):
        assert tokens <= padded < tokens + max(16, tokens / 16)
        assert padded % 16 == 0
        assert padded_length(padded) == padded, "padding a padded row changes it"
    assert lengths == sorted(lengths)
    assert len({padded for padded in lengths if padded >= 256}) <= 16 * 5  # five doublings of the length


def test_masks_do_not_gather_over_a_long_run():
    # Below a window, every length of a path needs a mask of its own: gigabytes in a long run if all were kept.
    trunk = tuple(range(400))
    for above in range(1, 130):
        leaves = [Example(trunk[:above] + (500 + k,) * 300, (0,) * above + (1,) * 300, str(k)) for k in range(2)]
        plan_attention(graft(leaves, least_saved=1), windows=(None, 350))
    assert _mask.cache_info().currsize <= 64
