"""Layers that carry a state: a row that branches gives the loss and the gradients of one record at a time.

The oracle is plain transformers + PEFT in float64, one record at a time.
"""

import copy
from functools import cache
from random import Random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from atomtune.batch.collate import Collator
from atomtune.batch.segment_plan import plan_paths, plan_segments
from atomtune.batch.tree import graft
from atomtune.data.records import Example
from atomtune.model import row_mixers
from atomtune.model.carried_state import States
from atomtune.model.fused_lora import Group, GroupedLora, compute_together
from atomtune.model.loss import body_of, innermost
from atomtune.model.mixers import find_mixers
from atomtune.model.row_attention import ROWS, register
from atomtune.model.row_mixers import announce, install, method_in_use, uninstall
from atomtune.verify import Result, in_batches, one_at_a_time
from benchmarks import workloads
from tests.hybrids import HYBRIDS, WORDS, hybrid

KINDS = {
    "qwen3_next": {"Qwen3NextGatedDeltaNet"},
    "qwen3_5_text": {"Qwen3_5GatedDeltaNet"},
    "lfm2": {"Lfm2ShortConv"},
    "mamba": {"MambaMixer"},
    "mamba2": {"Mamba2Mixer"},
}


def some_examples() -> list[Example]:
    """A trunk longer than a chunk of linear attention, three levels, a branch of one token, one that shares nothing."""
    draw = Random(5)

    def text(tokens: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, WORDS) for _ in range(tokens))

    trunk, branch, short = text(70), text(9), text(1)
    ids = [
        (*trunk, *branch, *text(5)),
        (*trunk, *branch, *text(1)),
        (*trunk, *branch, *short, *text(4)),
        (*trunk, *branch, *short, *text(7)),
        (*trunk, *text(12)),
        text(19),
        text(3),
    ]
    return [Example(i, (0, *[draw.randint(0, 1) for _ in i[2:]], 1), f"t:{n}") for n, i in enumerate(ids)]


EXAMPLES = some_examples()


@cache
def adapted(family):
    """Cached: copy the model before use."""
    return hybrid(family)


@cache
def alone(family: str) -> Result:
    return one_at_a_time(copy.deepcopy(adapted(family)), EXAMPLES)


def in_rows(model, layout, way, examples=EXAMPLES) -> Result:
    register()
    inner = innermost(model)
    mixers, attends = find_mixers(inner)
    if attends:
        inner.set_attn_implementation(ROWS)
    install(body_of(model), mixers, way)
    collator = Collator(layout=layout, pad_id=0, as_examples=lambda row: (Example(**row),), mixers=way)
    return in_batches(model, examples, collator, per_batch=len(examples))[0]


def assert_equal(ours: Result, theirs: Result) -> None:
    """Compare in float64; but transformers computes norms and the delta rule in float32 (up to 2e-5 at a target).

    Without its parent's state, a target after a fork differs by 0.1 or more.
    """
    apart = (ours.log_probabilities - theirs.log_probabilities).abs()
    assert abs(ours.loss - theirs.loss) < 1e-6 * theirs.loss
    assert apart.max() < 1e-4
    assert apart.mean() < 1e-5
    for name, gradient in theirs.gradients.items():
        assert gradient.any(), f"{name}: a gradient of zero would compare with anything"
        assert (ours.gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_the_example_records_form_a_tree_with_long_shared_prefixes():
    row = graft(EXAMPLES, least_saved=1)
    assert len(row) < sum(len(example.ids) for example in EXAMPLES) - 300
    assert max(row.positions()) > 64


@pytest.mark.parametrize("family", HYBRIDS)
def test_mixers_are_found_by_what_they_do(family):
    mixers, windows = find_mixers(innermost(adapted(family)))
    assert {type(mixer).__name__ for mixer in mixers} == KINDS[family]
    assert len(mixers) == 2
    assert windows == (set() if family in {"mamba", "mamba2"} else {None}), "of the attention beside them"


def test_a_mixer_whose_effect_is_smaller_than_bfloat16_rounding_is_detected():
    """A new delta rule forgets within a token: in bfloat16 later outputs change by only 2 % of the changed one."""
    sizes = {"vocab_size": WORDS, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model("qwen3_5_text", **workloads.KINDS["qwen3_5_text"], **sizes)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert {type(mixer).__name__ for mixer in find_mixers(base)[0]} == {"Qwen3_5GatedDeltaNet"}


@pytest.mark.parametrize("way", ["fork", "paths"])
@pytest.mark.parametrize("layout", ["packed", "tree"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_row_gives_the_loss_and_gradients_of_one_record_at_a_time(family, layout, way):
    assert_equal(in_rows(copy.deepcopy(adapted(family)), layout, way), alone(family))


@pytest.mark.parametrize("shared", [(5,), (5, 9)], ids=len)
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_shared_beginning_may_be_shorter_than_what_a_convolution_reads(family, shared):
    # In a large batch even the beginning-of-text token and the name of a role are shared.
    draw = Random(9)
    words = [tuple(draw.randrange(3, WORDS) for _ in range(4)) for _ in range(20)]
    examples = [Example((*shared, *own), (*[0] * len(shared), 1, 1, 1, 1), f"t:{n}") for n, own in enumerate(words)]
    assert len(graft(examples)) == len(shared) + 4 * len(words)
    expected = one_at_a_time(copy.deepcopy(adapted(family)), examples)
    assert_equal(in_rows(copy.deepcopy(adapted(family)), "tree", "fork", examples), expected)


class Noting(torch.nn.Module):
    """Returns its input and notes what else it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[object, ...]] = []

    def forward(self, hidden_states, position_ids=None, attention_mask=None, cache_params=None, scale=None):
        self.noted.append((position_ids, attention_mask, cache_params, scale))
        return hidden_states


class Body(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = Noting()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mixer(x, "positions", attention_mask="mask", cache_params="cache", scale=3)


@pytest.mark.parametrize("way", ["fork", "paths"])
def test_mask_and_cache_of_a_row_do_not_reach_a_mixer(way):
    row, body = graft(EXAMPLES, least_saved=1), Body()
    install(body, [body.mixer], way)
    announce(body, SimpleNamespace(mixers=plan_segments(row) if way == "fork" else plan_paths(row)))
    x = torch.randn(1, len(row), 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(body(x), x)
    for positions, mask, its_cache, scale in body.mixer.noted:
        assert (mask, scale) == (None, 3)
        if way == "fork":
            assert isinstance(its_cache, States)
        else:  # the positions are the row's, not a path's
            assert (positions, its_cache) == (None, None)
    assert body.mixer.noted


def test_lora_layers_sharing_an_input_compute_once_in_paths_mode(monkeypatch):
    # Once, each layer got its own copy of the input, so the first computed the whole group and the others repeated it.
    model = copy.deepcopy(adapted("qwen3_5_text"))
    groups = compute_together(model, input_ids=torch.tensor([[5, 9, 3]]))
    of_layers = [module.group for module in model.modules() if isinstance(module, GroupedLora)]
    assert len(of_layers) == groups > len(set(of_layers))
    computed: list[Group] = []
    compute = Group._compute

    def counted(group: Group, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if x.shape[-2] > 50:  # the probe that finds mixers is shorter than the row
            assert len(x) == 1, "the paths share tokens, which would be computed once for each path"
            computed.append(group)
        return compute(group, x)

    monkeypatch.setattr(Group, "_compute", counted)
    assert_equal(in_rows(model, "tree", "paths"), alone("qwen3_5_text"))
    assert sorted(map(id, computed)) == sorted(map(id, set(of_layers)))


def test_a_linear_layer_used_twice_in_a_mixer_keeps_its_forward():
    layer = torch.nn.Linear(4, 4, dtype=torch.float64)
    mixer = torch.nn.ModuleDict({"first": torch.nn.Sequential(layer), "second": torch.nn.Sequential(layer)})
    paths, first_on = torch.tensor([[0, 1], [0, 2]]), torch.tensor([0, 1, 3])
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[paths]
    with row_mixers._linear_layers_once(mixer, paths, first_on):
        # Not bit by bit: a product of three rows may be summed in another order than one of four.
        assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=1e-14)
        by_head = x.flatten(0, 1)  # a mixer may give a layer another shape; then it is not the paths' tokens
        assert torch.equal(layer(by_head), torch.nn.functional.linear(by_head, layer.weight, layer.bias))
    assert "forward" not in vars(layer)


def test_a_linear_layers_forward_that_something_else_has_replaced_is_called_and_restored():
    layer, shapes = torch.nn.Linear(4, 4), []
    own = layer.forward

    def noted(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return own(x)

    layer.forward = noted
    paths, first_on = torch.tensor([[0, 1], [0, 2]]), torch.tensor([0, 1, 3])
    with row_mixers._linear_layers_once(torch.nn.Sequential(layer), paths, first_on):
        layer(torch.zeros(3, 4)[paths])
    assert shapes == [(1, 3, 4)]
    assert layer.forward is noted


def test_a_forward_that_something_else_has_replaced_is_called_and_restored():
    # As accelerate replaces it, to move a layer's inputs to its device.
    model = copy.deepcopy(adapted("lfm2"))
    mixers, _ = find_mixers(innermost(model))
    own, calls = mixers[0].forward, []

    def replaced(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    mixers[0].forward = replaced
    install(body_of(model), mixers, "fork")
    model(input_ids=torch.tensor([[5, 9, 3]]), use_cache=False)
    assert calls == [1]
    uninstall(body_of(model), mixers)
    assert mixers[0].forward is replaced and "forward" not in vars(mixers[1])


@pytest.mark.parametrize("family", HYBRIDS)
def test_recomputed_activations_change_nothing(family):
    model = copy.deepcopy(adapted(family))
    model.enable_input_require_grads()
    innermost(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert_equal(in_rows(model, "tree", "fork"), alone(family))


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_call_without_a_row_matches_the_original_model(family):
    model = copy.deepcopy(adapted(family))
    ids = torch.tensor([EXAMPLES[0].ids])
    expected = model(input_ids=ids, use_cache=False).logits
    hooks = len(body_of(model)._forward_pre_hooks)
    in_rows(model, "tree", "fork")
    in_rows(model, "tree", "paths")  # replaces the other method
    with torch.no_grad():
        innermost(model).set_attn_implementation("eager")
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-5)
    mixers, _ = find_mixers(innermost(adapted(family)))
    uninstall(body_of(model), [m for m in model.modules() if type(m) in {type(mixer) for mixer in mixers}])
    assert method_in_use(body_of(model)) is None
    assert len(body_of(model)._forward_pre_hooks) == hooks
    assert not any("forward" in vars(module) for module in model.modules())
