"""Memory: the decision to recompute activations, and what is said when memory ran out."""

import torch
from transformers import LlamaConfig

from atomtune.model.memory import StepShape, activation_bytes, is_out_of_memory, peak_bytes, remedies, should_checkpoint

CPU = torch.device("cpu")
ATOM_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)


def test_activations_grow_with_tokens_layers_and_element_size():
    one = activation_bytes(ATOM_7B, tokens=1, element_bytes=2)
    assert activation_bytes(ATOM_7B, tokens=100, element_bytes=2) == 100 * one
    assert activation_bytes(ATOM_7B, tokens=1, element_bytes=4) == 2 * one
    shallow = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=16)
    assert activation_bytes(shallow, tokens=1, element_bytes=2) * 2 == one


def test_a_tiny_step_keeps_its_activations_and_a_huge_one_does_not():
    tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    assert not should_checkpoint(tiny, tokens=1000, element_bytes=4, device=CPU)
    assert should_checkpoint(ATOM_7B, tokens=10_000_000, element_bytes=2, device=CPU)


def test_the_peak_of_this_process_is_more_than_nothing():
    assert peak_bytes(CPU) > 50 * 2**20


def test_an_error_of_memory_is_told_from_others():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def shape(**changed) -> StepShape:
    values = {"batch": 16, "accumulation": 1, "max_seq_length": 512, "longest_tokens": 400, "checkpointing": False,
              "quantize": None, "on_gpu": True, "peak": 23 * 2**30}  # fmt: skip
    return StepShape(**{**values, **changed})


def test_what_is_already_done_is_not_advised():
    said = remedies(shape(checkpointing=True, quantize="nf4", batch=1))
    assert "--gradient_checkpointing" not in said
    assert "--quantize" not in said
    assert "--per_device_train_batch_size" not in said


def test_smaller_pieces_keep_the_global_batch():
    assert "--per_device_train_batch_size 8 --gradient_accumulation_steps 2" in remedies(shape())
    assert "23.0 GiB" in remedies(shape())
