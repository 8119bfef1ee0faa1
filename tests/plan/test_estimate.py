"""The estimates are close to what torch counts on a real model, and to what runs took."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from atomtune.model import memory
from atomtune.model.adapter import LoraSpec
from atomtune.plan.command import _kept_or_recomputed
from atomtune.plan.estimate import (
    SECONDS_A_LAYER,
    SHARE_OF_RATE,
    StepSpec,
    Work,
    fits_on_gpu,
    operations,
    seconds,
    step_memory,
)
from atomtune.plan.model_size import ModelSize, measure

LORA = LoraSpec(rank=8, alpha=32, dropout=0.0, targets=["all-linear"])
STEP = StepSpec(tokens=1000, element_bytes=2, quantize=None, dropout=False, libraries=0)


@pytest.fixture(scope="module")
def size(models) -> ModelSize:
    return measure(str(models("llama")), LORA)


@pytest.fixture(scope="module")
def qwen_7b() -> ModelSize:
    """The shape of a Qwen2.5-7B with an adapter of rank 8, as measured on a GPU (benchmarks/README.md)."""
    config = AutoConfig.for_model(
        "qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28
    )
    return ModelSize(
        config=config,
        weights=7_615_616_512,
        quantized=6_525_288_448,
        body=6_525_621_760,
        head=544_997_376,
        trained=20_185_088,
    )


@pytest.mark.parametrize(("recomputed", "dora"), [(False, False), (True, False), (False, True)])
def test_the_operations_are_those_that_torch_counts(models, size, recomputed, dora):
    """One row of 64 tokens, all of them targets, in plain transformers and PEFT.

    The formula leaves out the smallest products: 3 % of this tiny model, whose matrices are hardly larger than LoRA's.
    """
    base = AutoModelForCausalLM.from_pretrained(models("llama"), attn_implementation="eager")
    kind = {"use_dora": True, "lora_dropout": 0.1} if dora else {}
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", **kind))
    model.train()
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.arange(3, 67)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    # Eager attention computes all 64 keys for each query, masked or not.
    work = Work(steps=1, tokens=64, targets=64, mean_context=64, dora=dora)
    assert operations(size, work, recomputed=recomputed) == pytest.approx(counter.get_total_flops(), rel=0.15)


@pytest.mark.parametrize(
    ("tokens", "measured"), [(1_500, 25.3e9), (5_300, 49.0e9)], ids=["style, batch 16", "short, batch 64"]
)
def test_the_memory_of_a_step_is_what_a_gpu_measured(qwen_7b, tokens, measured):
    """Peak of torch's allocator on an H200 with activations kept, by tokens of the heaviest step."""
    step = StepSpec(tokens=tokens, element_bytes=2, quantize=None, dropout=False, libraries=0)
    assert step_memory(qwen_7b, step, recomputed=False).peak == pytest.approx(measured, rel=0.1)


def test_a_7b_model_fits_the_usual_gpu_sizes_in_nf4_and_16_bit(qwen_7b):
    """QLoRA of a 7B runs on cards of 8 to 12 GB; in 16 bits it fits into 24 GB but not into 16."""
    in_4_bits = StepSpec(tokens=1000, element_bytes=2, quantize="nf4", dropout=True, libraries=600 * 2**20)
    in_16_bits = StepSpec(tokens=1000, element_bytes=2, quantize=None, dropout=True, libraries=600 * 2**20)
    assert fits_on_gpu(step_memory(qwen_7b, in_4_bits, recomputed=True), 12)
    assert fits_on_gpu(step_memory(qwen_7b, in_16_bits, recomputed=True), 24)
    assert not fits_on_gpu(step_memory(qwen_7b, in_16_bits, recomputed=True), 16)


def test_the_cpu_kernel_cache_grows_with_row_lengths_up_to_its_limit(size):
    def kernels(lengths: int) -> int:
        step = StepSpec(tokens=1000, element_bytes=2, quantize=None, dropout=False, libraries=0, row_tokens=100,
                        lengths=lengths)  # fmt: skip
        return step_memory(size, step, recomputed=False).parts["kernels"]

    assert kernels(0) == 0  # a GPU caches none
    assert kernels(2) == 2 * kernels(1) > 0
    assert kernels(10_000) == kernels(1_000) < 1_000 * kernels(1)


def test_the_peak_is_the_sum_of_parts_and_recomputing_saves_only_activations(size):
    kept, recomputed = (step_memory(size, STEP, recomputed=flag) for flag in (False, True))
    assert kept.peak == sum(kept.parts.values())
    assert recomputed.parts["activations"] < kept.parts["activations"]
    assert {**kept.parts, "activations": 0} == {**recomputed.parts, "activations": 0}


def test_recomputing_half_of_the_layers_lies_halfway_in_memory_and_work(qwen_7b):
    kept, half, all_of_them = (step_memory(qwen_7b, STEP, recomputed=share).peak for share in (0, 0.5, 1))
    assert half == pytest.approx((kept + all_of_them) / 2, rel=0.02)
    work = Work(steps=1, tokens=1000, targets=1000, mean_context=500)
    less, between, more = (operations(qwen_7b, work, recomputed=share) for share in (0, 0.5, 1))
    assert between == (less + more) / 2


def test_on_a_cpu_products_and_launches_add_up_and_on_a_gpu_the_longer_counts(qwen_7b):
    """A GPU computes while its host launches the next kernels; a CPU does one after the other."""
    rate, steps = 1e14, 10
    launching = {kind: steps * 28 * SECONDS_A_LAYER[kind] for kind in ("cpu", "cuda")}
    for tokens in (100, 1_000_000):  # launches take longer, then products
        work = Work(steps=steps, tokens=tokens, targets=tokens // 2, mean_context=100)
        products = operations(qwen_7b, work, recomputed=0.5) / rate
        on_cpu, on_gpu = products / SHARE_OF_RATE["cpu"], products / SHARE_OF_RATE["cuda"]
        assert (on_gpu > launching["cuda"]) == (tokens == 1_000_000)
        times = {kind: seconds(qwen_7b, work, recomputed=0.5, kind=kind, rate=rate) for kind in ("cpu", "cuda", "mps")}
        assert times["cpu"] == pytest.approx(on_cpu + launching["cpu"])
        assert times["cuda"] == times["mps"] == pytest.approx(max(on_gpu, launching["cuda"]))


def test_the_plan_recomputes_the_layers_that_the_run_recomputes(monkeypatch, qwen_7b):
    # The run decides once the model is loaded and nothing else. The plan once assumed less room (Adam, logits).
    step = StepSpec(tokens=8192, element_bytes=2, quantize=None, dropout=True, libraries=10**9, attention_weights=True)
    auto = SimpleNamespace(run=SimpleNamespace(gradient_checkpointing="auto"))
    numbers = set()
    for free in range(20 * 10**9, 300 * 10**9, 10**9):
        planned = _kept_or_recomputed(auto, qwen_7b, step, free=free, usable=memory.USABLE)
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free, loaded=planned.loaded: free - loaded)
        decided = memory.ActivationMemory.of(
            qwen_7b.config, tokens=8192, element_bytes=2, dropout=True, in_rows=True, device=torch.device("cpu")
        ).layers_to_recompute
        assert round(planned.recomputed * qwen_7b.layers) == decided
        numbers.add(decided)
    assert len(numbers) > 10


def test_logit_memory_covers_only_the_targets_computed_at_once(qwen_7b):
    words = qwen_7b.config.vocab_size
    assert words > 2**20 / 128  # with fewer words, more targets would be computed at once
    assert step_memory(qwen_7b, STEP, recomputed=0).parts["logits"] == 128 * words * 8
    few = replace(STEP, tokens=10)
    assert step_memory(qwen_7b, few, recomputed=0).parts["logits"] == 10 * words * 8
