"""A base is loaded like in the training of its adapters, unless the user says otherwise."""

import pytest
import torch

from atomtune.model.adapter_folder import AdapterMetadata
from atomtune.model.base_as_trained import base_spec
from atomtune.model.load import device_in_use, resolve_dtype


def trained(dtype, quantize="nf4") -> AdapterMetadata:
    return AdapterMetadata(template="atom", instruction_role="user", stop="</s>", dtype=dtype, quantize=quantize)


@pytest.mark.parametrize(
    ("adapters", "quantize", "asked", "held"),
    [
        ([trained("float16")], "nf4", "auto", "float16"),
        ([trained("float16"), trained("float16")], "nf4", "auto", "float16"),
        ([trained("float16")], "nf4", "float64", "float64"),
        ([trained("float16"), trained("float64")], "nf4", "auto", "auto"),  # they share one base, so neither
        ([trained("float16")], "int8", "auto", "auto"),
        ([trained("float16")], None, "auto", "auto"),
        ([trained("float16", None)], None, "auto", "auto"),
        ([], "nf4", "auto", "auto"),
    ],
)
def test_a_base_quantized_as_in_training_gets_the_dtype_of_training(adapters, quantize, asked, held):
    spec = base_spec(
        adapters, path="m", dtype=asked, quantize=quantize, device_map=None, trust_remote_code=False, notice=print
    )
    expected = resolve_dtype("auto", device_in_use(), notice=print) if held == "auto" else getattr(torch, held)
    assert (spec.dtype, spec.quantize, spec.path) == (expected, quantize, "m")
