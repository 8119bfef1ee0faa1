"""The loss in chunks equals the loss from all logits at once, computed by the model's own forward."""

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.nn import functional
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import CausalLMOutput

from atomtune.batch.collate import Batch, Collator
from atomtune.data.records import Example
from atomtune.model import loss
from atomtune.model.adapter import LoraSpec, new_adapter
from atomtune.model.fused_lora import compute_together
from atomtune.model.layout_support import why_padded
from atomtune.model.loss import Head, innermost, model_inputs, target_log_probabilities, target_nats
from tests.model.test_layout_support import EXAMPLES, WORDS, Result, build, differs, gradients, with_adapter
from tests.tiny import SIZE

#: float64 on a CPU: only the order of sums differs, because both sides share the body's forward.
EXACT = 1e-12
#: Heads with more than a product: Granite divides its logits, Gemma 3 and Cohere cap or scale them.
HEADS: dict[str, dict[str, Any]] = {
    "llama": {},
    "granite": {},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "cohere": {**SIZE, "logit_scale": 0.25},
    "gpt2": {},
    # Its forward calls the decoder inside its body directly, and the decoder's last layer is narrower than the others.
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 64},
}
every_head = pytest.mark.parametrize("family", HEADS)
TARGETS = sum(sum(example.learn) for example in EXAMPLES)


@cache
def _adapted(family: str) -> Any:
    return with_adapter(build(family, **HEADS[family]))


def adapted(family: str) -> Any:
    return copy.deepcopy(_adapted(family))


def batch_of(examples: list[Example]) -> Batch:
    return Collator(layout="padded", pad_id=0, as_examples=lambda row: (Example(**row),)).lay(examples)


def chunks_of(monkeypatch: pytest.MonkeyPatch, targets: int) -> None:
    monkeypatch.setattr(loss, "LEAST_TARGETS", targets)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 1)


def in_chunks(model: Any, batch: Batch, label_smoothing: float = 0.0) -> Result:
    nats, _ = target_nats(model, batch, label_smoothing=label_smoothing)
    nats.backward()
    return Result(nats.item(), gradients(model))


def all_logits(model: Any, batch: Batch, label_smoothing: float = 0.0) -> Result:
    """The oracle: [B, T, V] logits by the model itself, and the loss written out, with label smoothing."""
    logits = model(**model_inputs(model, batch), use_cache=False).logits
    assert logits.shape == (*batch["input_ids"].shape, WORDS)
    scores = logits[batch["row"], batch["predicted_from"]].log_softmax(-1)  # [N, V]
    surprise = -scores[torch.arange(len(scores)), batch["target"]]
    each = (1 - label_smoothing) * surprise - label_smoothing * scores.mean(-1)
    nats = (each * batch["learn"]).sum()
    nats.backward()
    return Result(nats.item(), gradients(model))


@every_head
@pytest.mark.parametrize("targets", [1, 7, 10_000])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_any_chunk_size_gives_the_loss_and_gradients_of_full_logits(monkeypatch, family, targets, label_smoothing):
    # Catches a last chunk that is dropped or counted as a whole one, and a head without its scaling or cap.
    chunks_of(monkeypatch, targets)
    batch, model = batch_of(EXAMPLES), adapted(family)
    assert Head.of(model)
    ours = in_chunks(model, batch, label_smoothing)
    nats, gradient = differs(ours, all_logits(adapted(family), batch, label_smoothing))
    print(f"{family}: loss {nats:.1e}, gradient {gradient:.1e}")
    assert nats < EXACT
    assert gradient < EXACT


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("granite", "logits_scaling", 1.0),
        ("gemma3_text", "final_logit_softcapping", None),
        ("cohere", "logit_scale", 1.0),
    ],
)
def test_the_heads_scaling_or_soft_cap_affects_the_loss_in_these_tests(family, field, value):
    # Otherwise the comparison above could not detect its absence.
    without = with_adapter(build(family, **{**HEADS[family], field: value}))
    nats, _ = differs(in_chunks(adapted(family), batch_of(EXAMPLES)), in_chunks(without, batch_of(EXAMPLES)))
    assert nats > 1e-3


@pytest.fixture
def seen_by_the_head() -> Iterator[Any]:
    """Watch a model's output matrix; the list gets the shape of every tensor of logits."""
    hooks = []

    def watch(model: Any) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        head = innermost(model).get_output_embeddings()
        hooks.append(head.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape))))
        return shapes

    yield watch
    for hook in hooks:
        hook.remove()


@every_head
def test_the_logits_of_all_targets_never_exist_at_once(monkeypatch, seen_by_the_head, family):
    chunks_of(monkeypatch, 5)
    model = adapted(family)
    shapes, batch = seen_by_the_head(model), batch_of(EXAMPLES)
    target_nats(model, batch)[0].backward()
    first, *others = [torch.Size(shape).numel() // WORDS for shape in shapes]
    assert first <= len(batch["input_ids"]), "of the whole model's own logits one position is kept"
    assert max(others) == 5
    assert sum(others) == len(batch["target"]), "each target goes through the head once, backward included"


@pytest.mark.parametrize(("words", "most"), [(100, 2**20 // 100), (64_000, 128), (2**21, 128)])
def test_the_chunk_size_follows_the_vocabulary_size(words, most):
    # 2^20 logits are 4 MiB in float32. At least 128 targets, because each chunk reads the matrix once.
    assert loss.targets_at_once(words, torch.device("cpu")) == most


@pytest.mark.parametrize(("free", "logits"), [(1e6, 2**20), (1.6e9, 10_000_000), (80e9, 2**27)])
def test_on_a_gpu_logits_take_a_sixteenth_of_the_free_memory(monkeypatch, free, logits):
    # Ten bytes each; at least as many as on a CPU, and at most 2^27.
    monkeypatch.setattr(loss, "free_on_gpu", lambda _device: int(free))
    monkeypatch.setattr(loss, "_logits_that_fit", loss._logits_that_fit.__wrapped__)
    assert loss.targets_at_once(1_000, torch.device("cuda")) == logits // 1_000


@every_head
def test_scaling_the_loss_scales_the_gradients(family):
    # The gradient is computed in the forward pass; backward multiplies it (mean over the global batch, scaler).
    plain, scaled = adapted(family), adapted(family)
    target_nats(plain, batch_of(EXAMPLES))[0].backward()
    (target_nats(scaled, batch_of(EXAMPLES))[0] / 64).backward()  # a power of two, because RMSNorm rounds to float32
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(scaled)[name], gradient / 64, rtol=EXACT, atol=EXACT)


def test_a_trained_output_matrix_gets_its_gradient(monkeypatch):
    chunks_of(monkeypatch, 7)
    ours, theirs = adapted("llama"), adapted("llama")
    for model in (ours, theirs):
        innermost(model).lm_head.weight.requires_grad_(True)
    nats, gradient = differs(in_chunks(ours, batch_of(EXAMPLES)), all_logits(theirs, batch_of(EXAMPLES)))
    assert nats < EXACT
    assert gradient < EXACT


@every_head
def test_the_log_probabilities_equal_those_of_full_logits(family):
    model, batch = adapted(family), batch_of(EXAMPLES)
    with torch.no_grad():
        logits = model(**model_inputs(model, batch), use_cache=False).logits[batch["row"], batch["predicted_from"]]
    expected = -functional.cross_entropy(logits, batch["target"], reduction="none")
    torch.testing.assert_close(target_log_probabilities(model, batch), expected, rtol=EXACT, atol=EXACT)


@every_head
def test_evaluation_without_gradients_gives_the_same_loss(family):
    model, batch = adapted(family), batch_of(EXAMPLES)
    with torch.no_grad():
        nats, count = target_nats(model, batch)
    assert not nats.requires_grad
    assert count == TARGETS
    assert nats.item() == pytest.approx(all_logits(adapted(family), batch).nats, rel=EXACT)


def test_an_evaluation_computes_no_gradient_of_a_trained_output_matrix():
    model, grad_modes = adapted("llama"), []
    head = innermost(model).lm_head
    head.weight.requires_grad_(True)
    head.register_forward_hook(lambda _m, _i, out: grad_modes.append(out.requires_grad))
    with torch.no_grad():
        target_nats(model, batch_of(EXAMPLES))
    assert grad_modes and not any(grad_modes)


def test_a_trained_output_layer_is_evaluated_with_its_latest_weights():
    # A fused optimizer does not raise the weights' version, so copies from the step before were taken for the new ones.
    base = build("llama").requires_grad_(False)
    spec = LoraSpec(rank=4, alpha=8, dropout=0.0, targets=["all-linear", "lm_head"])
    model, batch = new_adapter(base, spec).double(), batch_of(EXAMPLES)
    ids = torch.tensor([EXAMPLES[0].ids])
    assert compute_together(model, input_ids=ids) == 2 * 7 + 1
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    target_nats(model.train(), batch)[0].backward()
    torch.optim.AdamW(learned, lr=0.5, fused=True).step()
    with torch.no_grad():
        nats, _ = target_nats(model.eval(), batch)
    assert nats.item() == pytest.approx(all_logits(model, batch).nats, rel=EXACT)


@every_head
def test_a_batch_without_targets_gives_zero_loss_and_zero_gradients(seen_by_the_head, family):
    # Under DDP every rank needs a gradient for every weight, or all ranks wait forever.
    model = adapted(family)
    silent = [Example(example.ids, (0,) * len(example.ids), example.origin) for example in EXAMPLES]
    shapes = seen_by_the_head(model)
    nats, count = target_nats(model, batch_of(silent))
    nats.backward()
    assert shapes == [(len(EXAMPLES), 1, WORDS)], "logits of all positions would be gigabytes"
    assert (nats.item(), int(count)) == (0.0, 0)
    assert all(gradient is not None and not gradient.any() for gradient in gradients(model).values())


def test_without_targets_the_loss_is_zero_even_if_the_sum_of_all_logits_overflows():
    model = adapted("llama").half()
    innermost(model).lm_head.weight.data.fill_(300)
    silent = [Example(example.ids, (0,) * len(example.ids), example.origin) for example in EXAMPLES]
    nats, _ = target_nats(model, batch_of(silent))
    assert nats.item() == 0.0


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("rwkv", {"attention_hidden_size": 32}),
        ("gemma4_text", {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0}),
    ],
)
def test_a_model_that_uses_more_than_hidden_states_gets_the_same_loss(family, values):
    model = with_adapter(build(family, **{**SIZE, **values})).float()  # grouped experts do not support float64
    theirs = all_logits(copy.deepcopy(model), batch_of(EXAMPLES))
    assert in_chunks(model, batch_of(EXAMPLES)).nats == pytest.approx(theirs.nats, rel=1e-5)


class _CallsItsBodysForward(LlamaForCausalLM):
    """Calls its body's forward directly, past hooks, as remote code may do."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **options):
        keep = options.pop("logits_to_keep", slice(None))
        output = LlamaModel.forward(
            self.model,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **options,
        )
        return CausalLMOutput(logits=self.lm_head(output[0][:, keep]))


def test_a_model_that_never_calls_its_body_module_is_run_as_a_whole():
    model = with_adapter(build("llama"))
    innermost(model).__class__ = _CallsItsBodysForward
    ours, batch = in_chunks(model, batch_of(EXAMPLES)), batch_of(EXAMPLES)
    nats, gradient = differs(ours, all_logits(adapted("llama"), batch))
    assert nats < EXACT
    assert gradient < EXACT
    assert target_log_probabilities(model, batch).shape == batch["target"].shape


def test_a_model_without_a_separate_body_is_run_as_a_whole():
    # As in a model's own code that names no `base_model_prefix`.
    model, batch = adapted("llama"), batch_of(EXAMPLES)
    innermost(model).base_model_prefix = "body"
    assert Head.of(model) is None
    nats, gradient = differs(in_chunks(model, batch), all_logits(adapted("llama"), batch))
    assert nats < EXACT
    assert gradient < EXACT


def test_a_forward_hooked_by_accelerate_is_not_called_by_the_head():
    # As with --device_map. The hooked forward is the whole model's: it would take the hidden states for embeddings.
    hooked = adapted("llama")
    add_hook_to_module(innermost(hooked), ModelHook())
    nats, gradient = differs(in_chunks(hooked, batch_of(EXAMPLES)), all_logits(adapted("llama"), batch_of(EXAMPLES)))
    assert nats < EXACT
    assert gradient < EXACT


class _Sharded(torch.nn.Parameter):
    """A weight whose class is another than torch's own, as FSDP's."""


@pytest.mark.parametrize("by", ["FSDP", "ZeRO-3"])
def test_a_head_with_sharded_weights_is_not_called_alone(by):
    # Its weights are gathered only during a call of the whole model.
    model = adapted("llama")
    head = innermost(model).lm_head
    if by == "FSDP":
        head.weight = _Sharded(head.weight.data, requires_grad=False)
    else:
        head.weight.ds_id = 0
    assert Head.of(model) is None


def with_auxiliary_loss(family: str, **more: Any) -> Any:
    model = with_adapter(build(family, **more)).float().train()  # torch's grouped product does not support float64
    innermost(model).config.output_router_logits = True
    return model


EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "router_aux_loss_coef": 0.5}


@pytest.mark.parametrize(
    ("family", "experts"),
    [("mixtral", EXPERTS), ("jetmoe", {"num_experts_per_tok": 2, "num_local_experts": 4, "aux_loss_coef": 0.5})],
)
def test_a_config_enabled_auxiliary_loss_equals_transformers_own(family, experts):
    model = with_auxiliary_loss(family, **experts)
    batch = batch_of(EXAMPLES)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[batch["row"], batch["predicted_from"] + 1] = batch["target"]
    theirs = innermost(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    if theirs.aux_loss is None:
        pytest.skip("the transformers installed here gives no auxiliary loss for this family")
    assert theirs.aux_loss > 0.1
    once = dict(batch, learn=torch.ones_like(batch["learn"]))  # transformers' labels count each target once
    nats, count = target_nats(model, once)
    assert (nats / count).item() == pytest.approx(theirs.loss.item(), rel=1e-6)  # its routers compute in float32
    model.eval()
    assert (target_nats(model, once)[0] / count).item() == pytest.approx(
        theirs.loss.item() - 0.5 * theirs.aux_loss.item(), rel=1e-6
    )


def test_an_auxiliary_loss_forces_the_padded_layout_with_the_reason():
    assert why_padded(with_adapter(build("mixtral", **EXPERTS)).float()) is None
    assert "auxiliary loss" in str(why_padded(with_auxiliary_loss("mixtral", **EXPERTS)))


def test_an_auxiliary_loss_with_coefficient_zero_is_switched_off():
    model = with_auxiliary_loss("mixtral", **{**EXPERTS, "router_aux_loss_coef": 0.0})
    assert why_padded(model) is None
    assert not innermost(model).config.output_router_logits
