"""Attention by blocks equals one softmax with the T x T mask that the row defines."""

from dataclasses import fields, is_dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional

from atomtune.batch import blocks
from atomtune.batch.attention_plan import AttentionPlan, padded_length, plan_attention
from atomtune.batch.pack import pack
from atomtune.batch.row import Row, single
from atomtune.batch.tree import graft
from atomtune.data.records import Example
from atomtune.model import block_attention, row_attention
from atomtune.model.row_attention import ROW_PLAN, attend
from atomtune.model.scores import ScoreRules
from tests.batch.test_tree import forest

#: float64 on a CPU: only the order of sums differs.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
WINDOWS = (None, 1, 2, 5, 24)


class Asked(NamedTuple):
    """q [1, H, T, D], k and v [1, H', T, D], and the gradient of the output, [1, T, H, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.k, self.v


def some_rows(number: int) -> list[Row]:
    layouts = [partial(graft, least_saved=1), graft, pack]
    return [layouts[seed % 3](forest(seed, longest=(14, 60)[seed % 2])) for seed in range(number)]


def asked(tokens: int, *, heads: int = 4, key_heads: int = 2, width: int = 6, seed: int = 0) -> Asked:
    """Random inputs like a model's: the heads are a view of [1, T, H, D]."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v, grad = (
        torch.randn(1, tokens, h, width, generator=draw, dtype=torch.float64)
        for h in (heads, key_heads, key_heads, heads)
    )
    return Asked(*(x.transpose(1, 2).requires_grad_() for x in (q, k, v)), grad)


def by_plan(plan: AttentionPlan, one: Asked, window: int | None = None, scaling: float | None = None) -> list:
    """[out, dq, dk, dv] of attend."""
    out, weights = attend(nn.Module(), *one.inputs, None, scaling=scaling, sliding_window=window, **{ROW_PLAN: plan})
    assert weights is None
    return [out, *torch.autograd.grad(out, one.inputs, one.grad)]


def written_out(  # noqa: PLR0917
    row: Row,
    plan: AttentionPlan,
    one: Asked,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> list:
    """[out, dq, dk, dv, and dsinks if there are sinks] of a dense softmax, written like in transformers' models."""
    groups = one.q.shape[1] // one.k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (one.k, one.v))
    scores = one.q @ k.mT * one.q.shape[-1] ** -0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~plan.visible(window), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(1, -1, scores.shape[2], 1)], dim=-1)
    weights = scores.softmax(-1)
    out = ((weights if sinks is None else weights[..., :-1]) @ v).transpose(1, 2)
    out = out * (torch.arange(out.shape[1]) < len(row))[None, :, None, None]
    return [out, *torch.autograd.grad(out, one.inputs + (() if sinks is None else (sinks,)), one.grad)]


def by_mask(row: Row, plan: AttentionPlan, one: Asked, window: int | None = None, scaling: float | None = None) -> list:
    """[out, dq, dk, dv] of scaled_dot_product_attention, with the padding's output and gradient set to zero."""
    seen = plan.visible(window)
    groups = one.q.shape[1] // one.k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (one.k, one.v))
    out = functional.scaled_dot_product_attention(one.q, k, v, attn_mask=seen, scale=scaling).transpose(1, 2)
    real = (torch.arange(out.shape[1]) < len(row))[None, :, None, None]
    out = out * real
    return [out, *torch.autograd.grad(out, one.inputs, one.grad)]


def assert_equal(ours: list, theirs: list) -> None:
    for name, one, other in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **EXACT, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("most_kept", [0, 1_000], ids=["computed again", "kept"])
@pytest.mark.parametrize("window", WINDOWS)
def test_block_attention_matches_masked_attention(monkeypatch, window, most_kept):
    # Catches any error of a plan or of the hand-written backward, padding included.
    monkeypatch.setattr(block_attention, "MOST_KEPT", most_kept)
    for seed, row in enumerate(some_rows(90)):
        plan = plan_attention(row, windows=(None, window), width=padded_length(len(row)))
        one = asked(len(plan.until), seed=seed)
        assert_equal(by_plan(plan, one, window), by_mask(row, plan, one, window))


@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 4])
def test_block_attention_in_many_chunks_matches_masked_attention(monkeypatch, window, heads, key_heads):
    # Catches a shared key whose gradient misses a chunk or a head that reads it.
    monkeypatch.setattr(blocks, "CHUNK_SIZES", (3,))
    for seed, row in enumerate(some_rows(40)):
        plan = plan_attention(row, windows=(window,), width=padded_length(len(row)))
        one = asked(len(plan.until), seed=seed, heads=heads, key_heads=key_heads)
        assert_equal(by_plan(plan, one, window), by_mask(row, plan, one, window))


@pytest.mark.parametrize("window", [None, 500])
def test_a_record_longer_than_a_block_matches_masked_attention(window):
    row = single(Example((1,) * 900, (0,) * 900, "train.jsonl:1"))
    plan = plan_attention(row, windows=(window,), width=padded_length(900))
    one = asked(len(plan.until), heads=2)
    assert_equal(by_plan(plan, one, window), by_mask(row, plan, one, window))


@pytest.mark.parametrize(("tokens", "are_kept"), [(200, True), (2_500, False)])
def test_weights_are_kept_for_the_backward_pass_only_where_they_are_small(tokens, are_kept):
    # At most eight times the queries. Those of a long record would take most of a layer's memory.
    row = single(Example((1,) * tokens, (0,) * tokens, "train.jsonl:1"))
    plan = plan_attention(row)
    one = asked(tokens, heads=1, key_heads=1, width=64)
    q, k, v = (x[0] for x in one.inputs)
    blocks = plan.blocks[None].each
    more = plan.places(None, 1, 1), plan.block_biases(None, q.dtype), ScoreRules(0.1)
    out = block_attention.BlockAttention.apply(q, k, v, None, blocks, *more)
    saved = [tensor for tensor in out.grad_fn.saved_tensors if tensor is not None]
    assert len(saved) == 3 + (len(blocks) if are_kept else 0), "q, k and v, then the weights of each block"


KINDS = {
    "plain": {},
    "soft cap": {"softcap": 0.8},  # scores reach about 3, so the cap changes most of them
    "sinks": {"sinks": True},
    "both": {"softcap": 0.8, "sinks": True},
}


@pytest.mark.parametrize("way", ["blocks", "blocks whose weights are kept", "spans"])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("value_width", [6, 3, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_softcap_sinks_and_any_value_width_match_dense_attention(monkeypatch, kind, value_width, window, way):
    # Catches a cap without its derivative in the backward, a sink missing in forward or backward, its missing gradient,
    # an output as wide as a query, and every error of the spans.
    monkeypatch.setattr(block_attention, "MOST_KEPT", 1_000 if "kept" in way else 0)
    cut = "spans" if way == "spans" else "blocks"
    if cut == "spans":
        monkeypatch.setattr(row_attention, "method_of", lambda *_, **__: "spans")
    for seed, row in enumerate(some_rows(12)):
        plan = plan_attention(row, windows=(None, window), width=padded_length(len(row)), cut=cut)
        one = asked(len(plan.until), seed=seed)
        draw = torch.Generator().manual_seed(seed)
        wide = [torch.randn(*x.shape[:-1], value_width, generator=draw, dtype=torch.float64) for x in (one.v, one.grad)]
        wide[1][:, len(row) :] = 0  # nothing reads what follows the row
        one = Asked(one.q, one.k, wide[0].requires_grad_(), wide[1])
        sinks = (
            torch.randn(4, generator=draw, dtype=torch.float64, requires_grad=True) if "sinks" in KINDS[kind] else None
        )
        softcap = KINDS[kind].get("softcap")
        keywords = {"sliding_window": window, "softcap": softcap, "s_aux": sinks, ROW_PLAN: plan}
        out, _ = attend(nn.Module(), *one.inputs, None, **keywords)
        inputs = one.inputs if sinks is None else (*one.inputs, sinks)
        ours = [out[:, : len(row)], *torch.autograd.grad(out, inputs, one.grad)]
        expected, *gradients = written_out(row, plan, one, window, softcap, sinks)
        for name, mine, other in zip(
            ("out", "dq", "dk", "dv", "dsinks"), ours, [expected[:, : len(row)], *gradients], strict=False
        ):
            torch.testing.assert_close(mine, other, **EXACT, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_without_a_plan_softcap_and_sinks_are_still_applied(mask):
    # In chat and in padded rows of such models, the library's fused attention would silently ignore both.
    one, sinks = asked(9), torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    given = {"none": None, "bool": seen, "additive": torch.zeros(1, 1, 9, 9).masked_fill(~seen, -torch.inf)}[mask]
    out, _ = attend(nn.Module(), *one.inputs, given, softcap=0.8, s_aux=sinks)
    row = single(Example((1,) * 9, (0,) * 9, "train.jsonl:1"))
    plan = plan_attention(row)
    torch.testing.assert_close(out, written_out(row, plan, one, None, 0.8, sinks)[0], **EXACT)


def test_per_token_sinks_and_position_bias_are_refused_only_with_a_plan():
    # Inkling 2. Without its bias, the trial found it not causal, or with a layer without a gradient.
    one, draw = asked(9), torch.Generator().manual_seed(0)
    heads = one.inputs[0].shape[1]
    sinks, bias = (torch.randn(1, heads, 9, n, generator=draw, dtype=torch.float64) for n in (1, 9))
    out, _ = attend(nn.Module(), *one.inputs, None, sinks=sinks, position_bias=bias)
    query, key, value = one.inputs
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5 + bias
    scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    torch.testing.assert_close(out, (weights @ value).transpose(1, 2), **EXACT)
    plan = plan_attention(single(Example((1,) * 9, (0,) * 9, "train.jsonl:1")))
    for keywords, reason in (({"position_bias": bias}, "a position bias"), ({"sinks": sinks}, "sinks of each token")):
        with pytest.raises(NotImplementedError, match=reason):
            attend(nn.Module(), *one.inputs, None, **keywords, **{ROW_PLAN: plan})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_spans_keep_the_dtype_and_the_accuracy(monkeypatch, kind, dtype):
    monkeypatch.setattr(row_attention, "method_of", lambda *_, **__: "spans")
    row = some_rows(6)[5]
    plan = plan_attention(row, width=padded_length(len(row)), cut="spans")
    one = asked(len(plan.until))
    one.grad[:, len(row) :] = 0
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    sinks, softcap = sinks if "sinks" in KINDS[kind] else None, KINDS[kind].get("softcap")
    low = Asked(*(x.detach().to(dtype).requires_grad_() for x in one.inputs), one.grad.to(dtype))
    low_sinks = None if sinks is None else sinks.detach().to(dtype)
    out, _ = attend(nn.Module(), *low.inputs, None, softcap=softcap, s_aux=low_sinks, **{ROW_PLAN: plan})
    ours = [out * (torch.arange(out.shape[1]) < len(row))[None, :, None, None]]
    ours += torch.autograd.grad(out, low.inputs, low.grad)
    for mine, theirs in zip(ours, written_out(row, plan, one, None, softcap, sinks), strict=False):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * theirs.norm()


def test_torch_still_has_the_private_flash_attention_arguments():
    # These names are private: a torch that changes them must fail here and not on a user's GPU.
    forward = {one.name for one in torch.ops.aten._flash_attention_forward.default._schema.arguments}
    backward = {one.name for one in torch.ops.aten._flash_attention_backward.default._schema.arguments}
    names = {"query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "scale"}
    assert names | {"return_debug_mask", "window_size_left", "window_size_right"} <= forward
    assert names | {"grad_out", "out", "logsumexp", "rng_state", "unused", "window_size_left"} <= backward


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 4), (4, 1), (6, 3)])
def test_grouped_query_heads_match_masked_attention(heads, key_heads):
    # Catches key head h % H' in place of h // groups.
    for seed, row in enumerate(some_rows(12)):
        plan = plan_attention(row)
        one = asked(len(row), heads=heads, key_heads=key_heads, seed=seed)
        assert_equal(by_plan(plan, one), by_mask(row, plan, one))


@pytest.mark.parametrize("scaling", [None, 0.05, 1.0, 3.0])
def test_every_scaling_matches_masked_attention(scaling):
    # None is D^-0.5; Granite and Gemma have their own scalings.
    for seed, row in enumerate(some_rows(12)):
        plan = plan_attention(row)
        one = asked(len(row), seed=seed)
        assert_equal(by_plan(plan, one, scaling=scaling), by_mask(row, plan, one, scaling=scaling))


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_under_autocast_it_computes_in_the_lower_precision(value_dtype, softcap):
    # A float32 base under bfloat16 autocast: RoPE returns float32 queries and keys beside bfloat16 values.
    row = some_rows(6)[5]
    plan = plan_attention(row)
    q, k, v = (x.detach() for x in asked(len(row)).inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inputs = (q.float(), k.float(), v.to(value_dtype))
        under, _ = attend(nn.Module(), *inputs, None, softcap=softcap, **{ROW_PLAN: plan})
    outside, _ = attend(nn.Module(), *(x.bfloat16() for x in (q, k, v)), None, softcap=softcap, **{ROW_PLAN: plan})
    assert under.dtype == torch.bfloat16
    assert torch.equal(under, outside)


def test_head_contiguous_inputs_give_the_same_result():
    # The other memory order; Blocks.places expects rows of [T * H, D].
    row = some_rows(6)[5]
    plan = plan_attention(row)
    one = asked(len(row))
    same = Asked(*(x.detach().contiguous().requires_grad_() for x in one.inputs), one.grad)
    assert_equal(by_plan(plan, same), by_plan(plan, one))


@pytest.mark.parametrize("window", [None, 5])
def test_padding_contents_never_affect_outputs_or_gradients(window):
    # Paths that are filled up read padded keys and values; 1e30 would show even with the smallest weight.
    padded = 0
    for seed, row in enumerate(some_rows(60)):
        plan = plan_attention(row, windows=(window,), width=padded_length(len(row)))
        one = asked(len(plan.until), seed=seed)
        before = by_plan(plan, one, window)
        with torch.no_grad():
            for x in (*one.inputs, one.grad.transpose(1, 2)):
                x[:, :, len(row) :] = 1e30
        after = by_plan(plan, one, window)
        out, *grads = after
        assert not out[:, len(row) :].any()
        assert not any(grad[:, :, len(row) :].any() for grad in grads)
        assert_equal(after, before)
        padded += len(plan.until) - len(row)
    assert padded > 100


def test_one_plan_serves_layers_with_different_windows_and_head_counts():
    # Indices are computed once and cached; layers with other windows or head counts must get their own.
    row = some_rows(6)[5]
    plan = plan_attention(row, windows=(None, 5), width=padded_length(len(row)))
    for window, heads in [(None, 4), (5, 4), (None, 2), (5, 2), (None, 4)]:
        one = asked(len(plan.until), heads=heads)
        assert_equal(by_plan(plan, one, window), by_mask(row, plan, one, window))


@pytest.mark.parametrize("window", [None, 5])
def test_attention_dropout_uses_the_dense_mask_with_one_random_draw(monkeypatch, window):
    # The blocks compute weights twice and cannot repeat a random draw.
    monkeypatch.setattr(row_attention, "BlockAttention", None)
    row = some_rows(6)[5]
    plan = plan_attention(row, windows=(None, 5))
    one = asked(len(row), heads=2)
    torch.manual_seed(3)
    keywords = {"dropout": 0.5, "sliding_window": window, ROW_PLAN: plan}
    out, _ = attend(nn.Module(), *one.inputs, None, **keywords)
    torch.manual_seed(3)
    expected = functional.scaled_dot_product_attention(*one.inputs, attn_mask=plan.visible(window), dropout_p=0.5)
    torch.testing.assert_close(out, expected.transpose(1, 2), **EXACT)


@pytest.mark.parametrize("kind", ["soft cap", "sinks", "both"])
@pytest.mark.parametrize("with_plan", [True, False])
def test_attention_dropout_is_applied_with_softcap_and_sinks(kind, with_plan):
    # A run on a base with attention_dropout started, because the trial has no dropout, and failed at its first step.
    row = single(Example((1,) * 9, (0,) * 9, "train.jsonl:1"))
    plan, one = plan_attention(row), asked(9, heads=2, key_heads=2)
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64) if "sinks" in KINDS[kind] else None
    softcap = KINDS[kind].get("softcap")
    keywords = {"dropout": 0.5, "softcap": softcap, "s_aux": sinks, **({ROW_PLAN: plan} if with_plan else {})}
    seen = plan.visible(None)
    torch.manual_seed(3)
    out, _ = attend(nn.Module(), *one.inputs, None if with_plan else seen, **keywords)
    torch.manual_seed(3)
    scores = one.q @ one.k.mT * one.q.shape[-1] ** -0.5
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    exponents = scores.masked_fill(~seen, -torch.inf).exp()
    total = exponents.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    expected = functional.dropout(exponents / total, 0.5) @ one.v
    torch.testing.assert_close(out, expected.transpose(1, 2), **EXACT)


class OnAGpu(NamedTuple):
    """The attributes of a tensor that decide how attention is computed."""

    tokens: int
    dtype: torch.dtype = torch.bfloat16
    is_cuda: bool = True
    device: str = "cuda"

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, 8, self.tokens, 64


@pytest.mark.parametrize(
    ("layout", "tokens", "dtype", "more", "way"),
    [
        ("packed", 100, torch.bfloat16, {}, "spans"),
        ("packed", 100, torch.float16, {"generation": 7}, "mask"),
        ("packed", 8_193, torch.float16, {"generation": 7}, "spans"),
        ("packed", 100_000, torch.bfloat16, {}, "spans"),
        ("tree", 100, torch.bfloat16, {}, "spans"),
        ("tree", 100, torch.bfloat16, {"sinks": True}, "spans"),
        ("tree", 100, torch.float32, {"softcap": 30.0}, "spans"),
        ("packed", 8_192, torch.float32, {}, "mask"),
        ("packed", 8_193, torch.float32, {}, "spans"),
        ("packed", 100, torch.bfloat16, {"dropout": True}, "mask"),
    ],
)
def test_on_a_gpu_kernels_are_chosen_by_row_and_dtype_and_generation(  # noqa: PLR0917  # pytest passes fixtures
    monkeypatch, layout, tokens, dtype, more, way
):
    # Never the gathered blocks, which were 12 times slower on a GPU. On a T4 (generation 7), a run with --fp16 ended in
    # "FlashAttention only supports Ampere GPUs or newer".
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (more.get("generation", 9), 0))
    examples = [Example((1, 2, 3, k), (0,) * 4, "train.jsonl:1") for k in range(9)]
    plan = plan_attention(graft(examples, least_saved=1) if layout == "tree" else pack(examples), cut="spans")
    heads, rules = OnAGpu(tokens, dtype), ScoreRules(1.0, more.get("softcap"))
    chosen = row_attention.method_of(
        plan, heads, heads, None, rules, sinks=more.get("sinks", False), dropout=more.get("dropout", False)
    )
    assert chosen == way


def tensors_in(value: object) -> list[torch.Tensor]:
    """All tensors in a value, at any depth of its fields."""
    if isinstance(value, torch.Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, one.name) for one in fields(value)]
    elif isinstance(value, dict):
        value = list(value.values())
    return [found for one in value for found in tensors_in(one)] if isinstance(value, list | tuple) else []


@pytest.mark.parametrize("cut", ["blocks", "spans"])
@pytest.mark.parametrize("window", [None, 5])
def test_moving_a_plan_to_another_device_moves_every_tensor(window, cut):
    # Catches a part that stays behind: on a GPU, a row by blocks would fail with an error about two devices.
    row = some_rows(6)[3]  # a tree
    here = plan_attention(row, windows=(None, 5), width=padded_length(len(row)), cut=cut)
    there = here.to(torch.device("meta"))
    there.dense_bias(window, torch.bfloat16)  # made on the device
    if cut == "blocks":
        there.places(window, 4, 2)
        there.block_biases(window, torch.bfloat16)
    found = tensors_in(there)
    assert len(found) > len(tensors_in(here)) >= 8
    assert all(tensor.is_meta for tensor in found)


def test_without_a_plan_attention_equals_torch_sdpa():
    # Chat and padded batches use the same function.
    one = asked(9)
    module = nn.Module()
    module.num_key_value_groups = 2
    module.is_causal = True
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    out, _ = attend(module, *one.inputs, mask)
    k, v = (x.repeat_interleave(2, dim=1) for x in (one.k, one.v))
    expected = functional.scaled_dot_product_attention(one.q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_attention_keeps_dtype_and_accuracy(dtype):
    # bfloat16 keeps 8 bits, and every sum of up to sixty values loses a few.
    row = some_rows(6)[5]
    plan = plan_attention(row, width=padded_length(len(row)))
    one = asked(len(plan.until))
    low = Asked(*(x.detach().to(dtype).requires_grad_() for x in one.inputs), one.grad.to(dtype))
    for ours, theirs in zip(by_plan(plan, low), by_mask(row, plan, one), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * theirs.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["blocks", "dense"])
def test_a_window_missing_from_the_plan_is_refused(dropout):
    # A layer with a window that the model's config does not name would otherwise see everything.
    row = some_rows(6)[5]
    plan = plan_attention(row, windows=(None, 5))
    keywords = {"dropout": dropout, "sliding_window": 3, ROW_PLAN: plan}
    with pytest.raises(NotImplementedError, match="a window of 3 tokens"):
        attend(nn.Module(), *asked(len(row), heads=2).inputs, None, **keywords)
