"""The law of layouts: packed, tree and padded rows give the loss and gradients of one record at a time.

The oracle is plain transformers + PEFT in float64, one record at a time, with the loss computed from the logits. The
tested side does everything at once: rows of many records, fused LoRA layers, chunked logits.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from atomtune.batch import collate
from atomtune.batch.attention_plan import plan_attention
from atomtune.batch.collate import Collator
from atomtune.batch.row import Row
from atomtune.batch.tree import graft
from atomtune.data.records import Example
from atomtune.errors import BadModel
from atomtune.model import layout_support, layout_trial, row_attention
from atomtune.model.adapter import LoraSpec, new_adapter
from atomtune.model.fused_layers import fuse_layers
from atomtune.model.layout_support import why_padded, windows_of
from atomtune.model.load import BaseSpec, keep_soft_caps, load_base
from atomtune.model.loss import innermost, target_nats
from tests import tiny
from tests.hybrids import HYBRIDS, hybrid
from tests.tiny import CAPPED, FAMILIES, SIZE

WORDS = 97
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GRANITE = {"logits_scaling": 3.0, "embedding_multiplier": 2.5, "residual_multiplier": 0.4, "attention_multiplier": 0.2}
#: Latent attention: queries and keys of 12 numbers, values of 8. All layers are dense; other tests cover routing.
DEEPSEEK = {
    **SIZE,
    "num_key_value_heads": SIZE["num_attention_heads"],
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 99,
    "n_routed_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA_3N = {
    **SIZE,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "sliding_window": 16,
    "layer_types": 2 * ["sliding_attention", "full_attention"],
    "vocab_size_per_layer_input": WORDS,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "intermediate_size": 4 * [64],
    "activation_sparsity_pattern": 4 * [0.0],
}
#: family → config values beyond those of tests.tiny. Windows (16 and 24) are shorter than the records and the rows.
VALUES: dict[str, dict[str, Any]] = {
    "llama": SIZE,
    "qwen3": {**SIZE, **FAMILIES["qwen3"][2]},
    "gemma3_text": {**SIZE, **FAMILIES["gemma3_text"][2], **BOTH_KINDS},
    "mistral": {**SIZE, **FAMILIES["mistral"][2]},
    "gpt2": {**FAMILIES["gpt2"][2], **NO_DROPOUT},
    "granite": {**SIZE, **GRANITE},
    "gemma2": CAPPED,
    "granite_swa": {**SIZE, "head_dim": 8, "sliding_window": 16},  # attention sinks
    "deepseek_v3": DEEPSEEK,
}
#: Their attention is not only a softmax with a mask; a GPU computes it by spans.
BESIDE_A_MASK = ("gemma2", "granite_swa")
every_family = pytest.mark.parametrize("family", VALUES)


@dataclass(frozen=True)
class Result:
    """Sum of the targets' nats, and the gradient of every adapter matrix."""

    nats: float
    gradients: dict[str, torch.Tensor]


def build(family: str, **more: Any) -> Any:
    """A tiny base in float64."""
    values = {**VALUES.get(family, SIZE), "vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, **more}
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **{"pad_token_id": None, **values}, use_cache=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    keep_soft_caps(model)
    return model


def with_adapter(base: Any, *targets: str) -> Any:
    """LoRA as after some training: if B were zero, A would have no gradient. targets: more than all-linear"""
    base.requires_grad_(False)
    model = new_adapter(base, LoraSpec(rank=4, alpha=8, dropout=0.0, targets=["all-linear", *targets])).eval()
    if base.dtype is torch.float64:
        model.double()
    draw = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * (0.3 if "lora_A" in name else 0.1))
    return model


@cache
def adapted(family: str) -> Any:
    """Cached: copy the model before use."""
    return with_adapter(build(family))


def some_examples() -> list[Example]:
    """Two trees of conversations with targets in their shared parts, a repeated record, and one that shares nothing."""
    draw = Random(3)

    def text(tokens: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, WORDS) for _ in range(tokens))

    long, short = text(30), text(18)
    fork = (*short, *text(17))
    ids = [(*long, *text(n)) for n in (4, 9, 21)] + [(*fork, *text(n)) for n in (3, 12)] + [(*short, *text(6))]
    ids += [text(11), ids[1]]
    examples = []
    for n, one in enumerate(ids, start=1):
        answer = [draw.randint(0, 1) for _ in one[14:]]
        learn = (0,) * 10 + (1, 1, 0, 1)  # each record learns the targets that they share
        examples.append(Example(one, (*learn, *answer)[: len(one)], f"train.jsonl:{n}"))
    return examples


EXAMPLES = some_examples()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def one_at_a_time(model: Any) -> Result:
    """The oracle. It does not use transformers' own .loss, which is float32 even for a float64 model."""
    total = 0.0
    for example in EXAMPLES:
        scores = model(input_ids=torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
        nats = torch.stack(
            [-scores[i - 1, example.ids[i]] * times for i, times in enumerate(example.learn) if times]
        ).sum()
        nats.backward()
        total += nats.item()
    return Result(total, gradients(model))


@cache
def alone(family: str) -> Result:
    return one_at_a_time(copy.deepcopy(adapted(family)))


def at_once(model: Any, layout: collate.Layout, *, checkpointing: bool = False) -> Result:
    """The tested side, set up like in train.model. Padded batches need no attention of ours and get none.

    The exception is transformers' eager attention. It casts its mask to float32, where float64's lowest number is -inf,
    and a padded token that a window hides from everything is then 0 / 0.
    """
    if layout != "padded" or innermost(model).config._attn_implementation == "eager":
        assert why_padded(model) is None
    fuse_layers(model, input_ids=torch.zeros(1, 2, dtype=torch.long))
    if checkpointing:
        model.enable_input_require_grads()
        innermost(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        assert innermost(model).is_gradient_checkpointing
    lay = Collator(
        layout=layout,
        pad_id=0,
        as_examples=lambda row: (Example(**row),),
        windows=windows_of(model),
        cut=layout_support.cut_of(model),
    ).lay
    nats, count = target_nats(model, lay(EXAMPLES))
    nats.backward()
    assert count == sum(sum(example.learn) for example in EXAMPLES)
    assert nats.dtype == innermost(model).dtype
    return Result(nats.item(), gradients(model))


def differs(ours: Result, theirs: Result) -> tuple[float, float]:
    """Relative differences: (loss, worst adapter matrix)."""
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert all(one.any() for one in theirs.gradients.values()), "a gradient of zero would compare with anything"
    worst = max(((ours.gradients[name] - one).norm() / one.norm()).item() for name, one in theirs.gradients.items())
    return abs(ours.nats - theirs.nats) / theirs.nats, worst


def assert_equal(family: str, layout: collate.Layout, ours: Result) -> None:
    """In float64, only the order of sums differs.

    But transformers' RMSNorm computes in float32, so gradients of branches that meet in it are rounded at 1e-7.
    """
    loss, gradient = differs(ours, alone(family))
    print(f"{family}: loss {loss:.1e}, gradient {gradient:.1e}")
    if family in BESIDE_A_MASK:  # transformers' eager attention computes its softmax in float32
        assert loss < 1e-7
        assert gradient < 1e-5
        return
    assert loss < 1e-12
    assert gradient < (1e-6 if layout == "tree" and family != "gpt2" else 1e-12)


@every_family
@pytest.mark.parametrize("layout", ["padded", "packed", "tree"])
def test_a_layout_gives_the_loss_and_gradients_of_one_record_at_a_time(family, layout):
    assert_equal(family, layout, at_once(copy.deepcopy(adapted(family)), layout))


@every_family
@pytest.mark.parametrize("layout", ["padded", "packed", "tree"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(family, layout):
    # Catches a plan that does not reach the recomputed layers, and LoRA layers that return stale results.
    assert_equal(family, layout, at_once(copy.deepcopy(adapted(family)), layout, checkpointing=True))


@every_family
@pytest.mark.parametrize("layout", ["packed", "tree"])
def test_the_dense_gpu_mask_gives_the_same_loss_and_gradients(monkeypatch, family, layout):
    if family not in BESIDE_A_MASK:
        monkeypatch.setattr(row_attention, "method_of", lambda *_, **__: "mask")
        assert_equal(family, layout, at_once(copy.deepcopy(adapted(family)), layout))


@every_family
@pytest.mark.parametrize("layout", ["packed", "tree"])
def test_gpu_attention_by_spans_gives_the_same_loss_and_gradients(monkeypatch, family, layout):
    monkeypatch.setattr(row_attention, "method_of", lambda *_, **__: "spans")
    monkeypatch.setattr(layout_support, "cut_of", lambda model: "spans")
    assert_equal(family, layout, at_once(copy.deepcopy(adapted(family)), layout))


def test_the_test_examples_contain_forks_and_shared_targets():
    # Without forks, windows and shared targets in the row, the comparisons above would say little.
    row = graft(EXAMPLES)
    assert not row.is_chain
    assert max(row.learn) == 4
    assert len(row) < sum(len(example.ids) for example in EXAMPLES) - 100
    assert max(row.positions()) > 24 * 2


# Planted bugs. Each must show, or the comparisons above prove nothing.


def wrong_plan(spoil: Callable[[Row], Row]) -> Callable[..., Any]:
    """The attention is planned for a damaged row; positions and targets stay right."""

    def plan(row: Row, **settings: Any) -> Any:
        return replace(plan_attention(spoil(row), **settings), position=plan_attention(row, **settings).position)

    return plan


def all_see_all_before(row: Row) -> Row:
    return replace(row, parent=tuple(range(-1, len(row) - 1)), until=(len(row),) * len(row))


def branches_miss_the_last_token_of_their_trunk(row: Row) -> Row:
    until = list(row.until)
    for i, parent in enumerate(row.parent):
        if -1 < parent != i - 1:
            until[parent] = min(until[parent], i)
    return replace(row, until=tuple(until))


def positions_in_the_row(row: Row, **settings: Any) -> Any:
    plan = plan_attention(row, **settings)
    return replace(plan, position=torch.arange(len(plan.position)))


def counted_once(examples: list[Example]) -> Row:
    row = graft(examples)
    return replace(row, learn=tuple(min(times, 1) for times in row.learn))


PLANTED = {
    "branches see each other": ("plan_attention", wrong_plan(all_see_all_before)),
    "a trunk's last token is hidden": ("plan_attention", wrong_plan(branches_miss_the_last_token_of_their_trunk)),
    "positions are indices": ("plan_attention", positions_in_the_row),
    "shared targets count once": ("graft", counted_once),
}


@every_family
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_changes_loss_and_gradients(monkeypatch, family, bug):
    model = copy.deepcopy(adapted(family))
    assert why_padded(model) is None
    with monkeypatch.context() as planted:
        planted.setattr(collate, *PLANTED[bug])
        windows = windows_of(model)
        lay = Collator(layout="tree", pad_id=0, as_examples=lambda row: (Example(**row),), windows=windows).lay
        nats, _ = target_nats(model, lay(EXAMPLES))
    nats.backward()
    loss, gradient = differs(Result(nats.item(), gradients(model)), alone(family))
    print(f"{family}, {bug}: loss {loss:.1e}, gradient {gradient:.1e}")
    assert loss > 1e-4  # 1e8 times the tolerance
    assert gradient > 1e-2


# Refusals.


@pytest.mark.parametrize(
    ("family", "values", "reason"),
    [
        # In transformers 5.17 its config does not name the kinds of its layers; then the trial detects it.
        (
            "recurrent_gemma",
            {"attention_window_size": 16, "lru_width": 32, "num_hidden_layers": 3},
            "layers of the kind linear_attention|a trial tree differs",
        ),
        ("bloom", {}, "takes no position_ids"),
        # In a record of up to 2,048 tokens all 16 blocks of 128 tokens are read, so the trial cannot see the selection.
        (
            "minimax_m3_vl_text",
            {**EXPERTS, "head_dim": 8, "layer_types": ["full_attention", "minimax_m3_sparse"]},
            "layers of the kind minimax_m3_sparse",
        ),
    ],
)
def test_the_tree_layout_is_refused_for_models_whose_results_it_changes(family, values, reason):
    # RG-LRU resets its state only at position 0 and accepts no initial state. Bloom takes positions from its mask.
    base = build(family, **{**SIZE, **values})
    before = base.config._attn_implementation
    said = why_padded(base)
    assert said is not None
    assert re.search(reason, said)
    assert base.config._attn_implementation == before, "a refused model keeps its own attention"


def test_padded_rows_use_the_models_own_position_numbering():
    # RoBERTa's first position is its padding id + 1.
    model = build("roberta", **SIZE, is_decoder=True, pad_token_id=1)
    model.requires_grad_(False).lm_head.dense.requires_grad_(True)
    lay = layout_support.collator_for(model, "padded", pad_id=1, as_examples=lambda row: ()).lay
    expected = one_at_a_time(model)
    nats, _ = target_nats(model, lay(EXAMPLES))
    assert nats.item() == pytest.approx(expected.nats, rel=1e-6)


def test_a_model_whose_results_depend_on_padding_is_refused():
    # CPM-Ant counts positions from the end of the row, with padding.
    model = build("cpmant", dim_model=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=2)
    with pytest.raises(BadModel, match="results depend on padding"):
        layout_support.collator_for(model, "padded", pad_id=0, as_examples=lambda row: ())


def test_a_model_that_cannot_compute_padded_rows_is_refused_with_the_reason():
    # XLNet's causal mask cannot be combined with a padding mask.
    config = AutoConfig.for_model("xlnet", d_model=32, n_layer=1, n_head=4, d_inner=48, attn_type="uni")
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(BadModel, match="cannot compute padded rows: RuntimeError"):
        layout_support.collator_for(model, "padded", pad_id=0, as_examples=lambda row: ())


def test_memory_that_runs_out_in_the_trial_of_padded_rows_is_no_fault_of_the_model(monkeypatch):
    def full(*_arguments: Any, **_keywords: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(layout_trial, "_log_probabilities", full)
    with pytest.raises(torch.OutOfMemoryError):
        layout_support.collator_for(build("llama"), "padded", pad_id=0, as_examples=lambda row: ())


def test_the_tree_layout_is_refused_for_remote_code_without_position_ids(models):
    base = AutoModelForCausalLM.from_pretrained(models("baichuan_like"), trust_remote_code=True)
    assert why_padded(base) == "its forward takes no position_ids"


def test_the_tree_layout_is_refused_if_the_forward_fails_on_rows():
    assert "its forward fails" in why_padded(build("falcon", **SIZE, alibi=True))


@pytest.mark.parametrize("family", ["nemotron", "stablelm"])
def test_a_model_whose_attention_cannot_be_replaced_uses_the_attention_mask(family):
    # Their attention cannot be replaced: keywords do not reach it.
    plain = with_adapter(build(family))
    model = copy.deepcopy(plain)
    ours = at_once(model, "tree")
    assert innermost(model).config._attn_implementation == "sdpa"
    loss, gradient = differs(ours, one_at_a_time(plain))
    assert loss < 1e-7  # nemotron's LayerNorm computes in float32
    assert gradient < 1e-5


#: Longer than the trial's records, so the trial cannot see the window.
LONG_WINDOW = {**SIZE, "sliding_window": 200}


def test_the_tree_layout_is_refused_for_a_window_in_irreplaceable_attention(monkeypatch):
    # As in a model with its own code: transformers only warns, and the plans by path ignored the model's own mask.
    base = build("mistral", **LONG_WINDOW)
    monkeypatch.setattr(PreTrainedModel, "_can_set_attn_implementation", classmethod(lambda _cls: False))
    assert why_padded(base) == "its attention cannot be replaced"


def test_the_tree_layout_is_refused_for_a_window_that_only_the_mask_has():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    base = build("qwen2_moe", **LONG_WINDOW, **experts, use_sliding_window=True, shared_expert_intermediate_size=16)
    assert "a window of 200 tokens that the layer does not pass on" in why_padded(base.float())


def test_the_tree_layout_is_refused_for_a_window_missing_from_the_config(monkeypatch):
    # With our own mask, which has no window, a trial on records shorter than the window found no fault.
    base = build("mistral", **LONG_WINDOW)
    monkeypatch.setattr(layout_support, "windows_of", lambda _model: (None,))
    assert "a window of 200 tokens that the config does not name" in why_padded(base.float())


@pytest.mark.parametrize("family", HYBRIDS)
def test_stateful_layers_use_the_padded_layout_with_sharded_weights(family):
    model = hybrid(family)
    plain = innermost(model).config._attn_implementation
    assert "FSDP and DeepSpeed" in why_padded(model, sharded=True)
    assert innermost(model).config._attn_implementation == plain
    assert layout_support.mixer_method_of(model) is None
    assert why_padded(model) is None


def test_attention_only_models_share_prefixes_with_sharded_weights():
    assert why_padded(with_adapter(build("llama")), sharded=True) is None


def test_gemma_3n_has_finite_and_right_gradients_in_every_layout():
    # It normalizes each token's input: padding with the pad id's zero row gave a right loss and NaN gradients.
    base = build("gemma3n_text", **GEMMA_3N)
    base.get_input_embeddings().weight.data[0] = 0.0  # as the pad id's row is if the config names it
    base.model.embed_tokens_per_layer.weight.data[0] = 0.0
    plain = with_adapter(base)
    expected = one_at_a_time(plain)
    used = [name for name, gradient in expected.gradients.items() if gradient.any()]
    assert len(used) > 0.8 * len(expected.gradients)  # its first layers multiply some matrices by zero
    for layout in ("padded", "packed", "tree"):
        model = copy.deepcopy(plain)
        model.zero_grad()
        ours = at_once(model, layout)
        assert all(bool(torch.isfinite(gradient).all()) for gradient in ours.gradients.values())
        of_used = [Result(side.nats, {name: side.gradients[name] for name in used}) for side in (ours, expected)]
        loss, gradient = differs(*of_used)
        print(f"gemma3n_text {layout}: loss {loss:.1e}, gradient {gradient:.1e}")
        assert loss < 1e-7  # its norms compute in float32
        assert gradient < 1e-4


# nf4 has blocks of 64 weights, so rows must be at least that long.
@pytest.mark.parametrize(("quantize", "width"), [("nf4", 64), ("int8", 32)])
def test_the_tree_layout_is_correct_on_a_quantized_base(tmp_path, quantize, width):
    # Weights in 4 or 8 bits have other values, but the same ones in every layout.
    pytest.importorskip("bitsandbytes")
    folder = tiny.build("llama", tmp_path, hidden_size=width)
    spec = BaseSpec(path=str(folder), dtype=torch.float32, device=torch.device("cpu"), quantize=quantize)
    model = with_adapter(load_base(spec)).train()
    plain = one_at_a_time(model)
    apart = {}
    for layout in ("padded", "tree"):
        model.zero_grad()
        apart[layout] = differs(at_once(model, layout), plain)
        print(f"{quantize} {layout}: loss {apart[layout][0]:.1e}, gradient {apart[layout][1]:.1e}")
    # In 8 bits a token's values depend on the rest of the batch, also in a padded one (there up to 2e-2).
    loss, gradient = {"nf4": (1e-6, 1e-4), "int8": (1e-3, 5e-2)}[quantize]
    assert apart["tree"][0] < loss
    assert apart["tree"][1] < gradient
