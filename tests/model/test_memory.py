"""Memory: when activations are recomputed, and the messages after memory ran out."""

import re

import psutil
import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from atomtune import container
from atomtune.model import base_shape
from atomtune.model import memory as memory_room
from atomtune.model.base_shape import tokens_in_memory
from atomtune.model.block_attention import MOST_KEPT
from atomtune.model.memory import (
    USABLE,
    USABLE_ON_GPU,
    ActivationMemory,
    StepShape,
    activation_bytes,
    free_bytes,
    held_bytes,
    input_bytes,
    is_out_of_memory,
    machine_bytes,
    mapped_bytes,
    peak_bytes,
    remedies,
    ways_to_save,
)
from atomtune.train.run_identity import OURS, TRAINER_SETTINGS

CPU = torch.device("cpu")
ATOM_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)


def test_activations_grow_with_tokens_layers_and_element_size():
    one = activation_bytes(ATOM_7B, tokens=1, element_bytes=2)
    assert activation_bytes(ATOM_7B, tokens=100, element_bytes=2) == 100 * one
    assert activation_bytes(ATOM_7B, tokens=1, element_bytes=4) == 2 * one
    shallow = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=16)
    assert activation_bytes(shallow, tokens=1, element_bytes=2) * 2 == one


def test_recomputed_layers_keep_one_hidden_state_of_each_token():
    assert input_bytes(ATOM_7B, tokens=100, element_bytes=2) == 100 * 32 * 4096 * 2


def test_the_estimate_is_near_what_was_measured():
    # H100, Qwen2.5-7B shape, bfloat16, LoRA on all linear layers without dropout: 6.3 MB per token were measured.
    qwen = Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28)
    assert 6.3e6 < activation_bytes(qwen, tokens=1, element_bytes=2) < 6.8e6


def test_dropout_adds_one_mask_byte_per_lora_input_element():
    one = activation_bytes(ATOM_7B, tokens=1, element_bytes=2)
    masks = activation_bytes(ATOM_7B, tokens=1, element_bytes=2, dropout=True) - one
    assert masks == 32 * (3 * 4096 + 11008)  # one byte per element of a LoRA input, for its dropout mask


def test_dora_is_counted_as_measured_on_smollm2():
    # float32, 432 tokens: PEFT's DoRA took 1.36 GB more than plain LoRA.
    smollm2 = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
    plain, dora = (activation_bytes(smollm2, tokens=432, element_bytes=4, dora=dora) for dora in (False, True))
    assert dora - plain == pytest.approx(1.36e9, rel=0.05)


def test_a_list_of_intermediate_sizes_per_layer_is_accepted():
    # Gemma 3n's config has a list.
    config = PreTrainedConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=[64, 128])
    assert activation_bytes(config, tokens=1, element_bytes=4) == 2 * (11 * 32 + 4 * 96) * 4
    widest = PreTrainedConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=128)
    assert tokens_in_memory(config, 10**7) == tokens_in_memory(widest, 10**7) > 256


def memory(config, tokens: int) -> ActivationMemory:
    return ActivationMemory.of(config, tokens=tokens, element_bytes=2, dropout=False, in_rows=True, device=CPU)


@pytest.mark.parametrize(
    ("in_rows", "device", "is_kept"), [(True, "cpu", True), (False, "cpu", False), (True, "cuda", False)]
)
def test_rows_on_a_cpu_also_keep_their_attention_weights(monkeypatch, in_rows, device, is_kept):
    monkeypatch.setattr(memory_room, "free_bytes", lambda _device: 10**9)
    step = ActivationMemory.of(
        ATOM_7B, tokens=1, element_bytes=2, dropout=False, in_rows=in_rows, device=torch.device(device)
    )
    weights = MOST_KEPT * 4096 * 32 * 2 if is_kept else 0
    assert step.needed == activation_bytes(ATOM_7B, tokens=1, element_bytes=2) + weights
    assert step.usable == (USABLE if device == "cpu" else USABLE_ON_GPU)


def test_a_tiny_step_keeps_its_activations_and_a_huge_one_does_not():
    tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    assert memory(tiny, 1_000).fits
    assert not memory(ATOM_7B, 10_000_000).fits


def test_the_memory_decision_is_described_with_its_figures():
    memory = ActivationMemory(
        tokens=1_100, needed=7_150_000_000, inputs=200_000_000, layers=28, free=61_000_000_000, usable=0.85
    )
    said = str(memory)
    assert said == "a step of 1,100 tokens keeps 7.2 GB, 61.0 GB is free"


def test_the_peak_memory_of_this_process_is_measured():
    assert peak_bytes(CPU) > 50 * 2**20


def test_an_out_of_memory_error_is_distinguished_from_others():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def shape(**changed) -> StepShape:
    values = {"batch": 16, "accumulation": 1, "max_seq_length": 512, "longest_tokens": 400, "checkpointing": False,
              "quantize": None, "on_gpu": True, "peak": 23 * 10**9}  # fmt: skip
    return StepShape(**{**values, **changed})


def test_settings_already_in_use_are_not_suggested_as_remedies():
    said = remedies(shape(checkpointing=True, quantize="nf4", batch=1))
    assert "--gradient_checkpointing" not in said
    assert "--quantize" not in said
    assert "--per_device_train_batch_size" not in said


def test_which_remedies_a_resume_takes_only_anyway_is_said():
    # A resume compares the settings that change what a step computes (train/run_identity.py), and was refused.
    kept = {*TRAINER_SETTINGS, *OURS["model"], *OURS["data"], *OURS["lora"]}
    suggested = set(re.findall(r"--(\w+)", "".join(ways_to_save(shape()))))
    assert suggested - kept == {"gradient_checkpointing"}
    assert "all but --gradient_checkpointing also need --resume_anyway" in remedies(shape())
    assert "--resume --resume_anyway" in remedies(shape(checkpointing=True))


@pytest.mark.parametrize(
    ("batch", "accumulation", "smaller", "more"),
    [(16, 1, 8, 2), (5, 1, 1, 5), (9, 1, 3, 3), (7, 2, 2, 7), (3, 4, 1, 12)],
)
def test_the_suggested_smaller_batch_keeps_the_global_batch_size(batch, accumulation, smaller, more):
    # Regression: for 5 × 1 it suggested 2 × 2 as "the same updates".
    lines = remedies(shape(batch=batch, accumulation=accumulation))
    assert f"--per_device_train_batch_size {smaller} --gradient_accumulation_steps {more}:" in lines
    assert "23.0 GB" in lines


def test_in_a_container_its_own_limit_counts_where_it_is_tighter(monkeypatch):
    # Regression: in a container of 2.5 GB on a machine of 24, a run of 12 GB was said to fit.
    of_machine = psutil.virtual_memory().total
    monkeypatch.setattr(container, "memory_limit", lambda: 2_000)
    monkeypatch.setattr(container, "memory_left", lambda: 1_000)
    assert (machine_bytes(), free_bytes(CPU)) == (2_000, 1_000)
    monkeypatch.setattr(container, "memory_limit", lambda: 2**60)
    assert machine_bytes() == of_machine


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "/proc/meminfo"), psutil.NoSuchProcess(1)], ids=str
)
def test_unknown_system_memory_counts_as_no_free_memory(models, monkeypatch, error):
    """In a container without /proc, psutil raised an error and the run ended with a traceback."""

    def refuse(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    monkeypatch.setattr(psutil, "Process", refuse)
    monkeypatch.setattr(container, "memory_left", lambda: None)
    monkeypatch.setattr(container, "memory_limit", lambda: None)
    assert machine_bytes() is free_bytes(CPU) is held_bytes() is None and mapped_bytes() == 0
    tiny = memory(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2), 1_000)
    assert not tiny.fits and "does not say how much memory is free" in str(tiny)
    assert tiny.layers_to_recompute == tiny.layers == 2
    assert base_shape.base_shape(str(models("llama"))).longest == 512, "as many as the base has positions"
