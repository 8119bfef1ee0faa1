"""Mixer kernels: the notice names what the library really uses; a stand-in package shows it."""

import functools
import importlib
import json
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from atomtune.cli import main
from atomtune.errors import BadModel
from atomtune.model.failures import of_the_model
from atomtune.model.mixer_kernels import MixerKernels, is_replaced, kernels_of, package_that_raised
from atomtune.train.run_errors import told_to_user
from tests.conftest import write_jsonl
from tests.hybrids import HYBRIDS, hybrid
from tests.tiny import FAMILIES, SIZE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_without_kernel_packages_each_family_lists_the_missing_ones():
    pip_names = {family: set(kernels_of(hybrid(family)).missing) for family in HYBRIDS}
    assert pip_names == {
        "qwen3_next": {"causal-conv1d", "flash-linear-attention"},
        "qwen3_5_text": {"causal-conv1d", "flash-linear-attention"},
        "lfm2": {"causal-conv1d"},
        "mamba": {"causal-conv1d", "mamba-ssm"},
        "mamba2": {"causal-conv1d", "mamba-ssm"},
    }
    assert not any(kernels_of(hybrid(family)).used for family in HYBRIDS)


def test_an_installed_kernel_package_is_reported_as_used(monkeypatch):
    # The library looks for packages when it imports a model's file, so the file is imported again here.
    package = ModuleType("causal_conv1d")
    package.causal_conv1d_fn = lambda x, weight, bias=None, activation=None: x
    package.causal_conv1d_update = package.causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    file = importlib.import_module("transformers.models.lfm2.modeling_lfm2")
    with monkeypatch.context() as fresh:
        fresh.delitem(sys.modules, file.__name__)
        beside = importlib.import_module(file.__name__)
        config = AutoConfig.for_model("lfm2", **HYBRIDS["lfm2"])
        assert kernels_of(beside.Lfm2ForCausalLM(config)) == MixerKernels(used=("causal-conv1d",), missing=())
    sys.modules["transformers.models.lfm2"].modeling_lfm2 = file


def test_an_error_raised_by_a_kernel_package_is_reported_in_its_own_words(tmp_path):
    """On Hopper, fla 0.6 refuses Triton 3.6 in its backward, and the run ended with a traceback."""
    refused = "Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs produces incorrect results. Please upgrade Triton."
    module = {"__name__": "fla.ops.common.chunk_o"}
    exec(f"def backward(compile):\n    compile()\n    raise RuntimeError({refused!r})", module)
    with pytest.raises(RuntimeError) as caught:
        module["backward"](lambda: None)
    answer = told_to_user(caught.value, TrainingArguments(str(tmp_path)), again="")
    assert isinstance(answer, BadModel)
    assert refused in str(answer)
    assert "pip uninstall flash-linear-attention" in str(answer)
    with pytest.raises(ZeroDivisionError) as inside:  # raised in a function that the package calls
        module["backward"](lambda: 1 / 0)
    assert package_that_raised(inside.value) == "flash-linear-attention"
    other = {"__name__": "causal_conv1d.interface"}
    exec("def refuse():\n    raise RuntimeError", other)
    with pytest.raises(RuntimeError) as of_another:  # the innermost package is the one that refuses
        module["backward"](other["refuse"])
    assert package_that_raised(of_another.value) == "causal-conv1d"
    with pytest.raises(ZeroDivisionError) as elsewhere:
        1 / 0  # noqa: B018
    assert told_to_user(elsewhere.value, TrainingArguments(str(tmp_path)), again="") is elsewhere.value


def test_a_bitsandbytes_error_is_reported_with_the_setting_to_change():
    """Its CPU kernels need widths that are multiples of 32: a chat in nf4 ended in a traceback."""
    module = {"__name__": "bitsandbytes.functional"}
    exec("def convert():\n    raise AssertionError('N must be divisible by block_n')", module)
    with pytest.raises(AssertionError) as caught:
        module["convert"]()
    answer = of_the_model(caught.value)
    assert isinstance(answer, BadModel)
    assert "N must be divisible by block_n" in str(answer) and "--quantize value (nf4 or int8)" in str(answer)


@pytest.mark.parametrize("command", ["verify", "evaluate", "chat", "certify", "merge"])
def test_every_command_reports_an_error_raised_by_a_kernel_package(by_heart, tmp_path, monkeypatch, capsys, command):
    """Once this was a traceback with "a bug in atomtune", or the model's files were called broken."""
    if command == "certify":
        pytest.importorskip("fastapi", reason="transformers serve is not installed")
    module = {"__name__": "fla.ops.common.chunk_o"}
    exec("def forward(self, *inputs, **options):\n    raise RuntimeError('Please upgrade Triton.')", module)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaAttention.forward", module["forward"])
    base = json.loads((by_heart / "adapter_config.json").read_text())["base_model_name_or_path"]
    records = write_jsonl(tmp_path / "data.jsonl", [{"instruction": "Who?", "output": "Me."}] * 4)
    data = ["--dataset_path", str(records)]
    adapter = ["--adapter_path", str(by_heart)]
    words = {
        "verify": ["--model_path", base, *data],
        "evaluate": [*adapter, *data],
        "chat": [*adapter, "--prompt", "Who?"],
        "certify": [*adapter, "--engine", "transformers"],
        "merge": [*adapter, "--output_dir", str(tmp_path / "merged")],
    }
    assert main([command, *words[command]]) == 2
    said = capsys.readouterr().err
    assert "Please upgrade Triton." in said
    assert "pip uninstall flash-linear-attention" in said
    assert "Traceback" not in said


def test_a_model_without_mixer_layers_has_no_kernel_notice():
    config = AutoConfig.for_model("llama", **{**SIZE, **FAMILIES["llama"][2]}, vocab_size=50)
    assert not kernels_of(AutoModelForCausalLM.from_config(config))


def test_the_gpu_notice_gives_the_pip_install_command():
    both = MixerKernels(used=("causal-conv1d",), missing=("flash-linear-attention",))
    assert both.described(CUDA) == (
        "linear attention, Mamba, convolutions: kernels of causal-conv1d, the rest by transformers' own torch code. "
        "For faster kernels: pip install flash-linear-attention"
    )
    none = MixerKernels(used=(), missing=("causal-conv1d", "mamba-ssm"))
    assert none.described(CPU) == (
        "linear attention, Mamba, convolutions: transformers' own torch code. "
        "On a GPU, causal-conv1d and mamba-ssm would be faster."
    )


def test_if_nothing_is_missing_the_notice_names_only_what_is_used():
    whole = MixerKernels(used=("causal-conv1d", "mamba-ssm"), missing=())
    assert whole
    assert whole.described(CUDA) == ("linear attention, Mamba, convolutions: kernels of causal-conv1d and mamba-ssm.")


def as_transformers_writes_it(package: str, *, is_new_implementation: bool) -> Callable[[], object]:
    """A function with the closure that transformers' decorator gives it, behind another decorator."""

    def function() -> object:
        return package, is_new_implementation

    @functools.wraps(function)
    def decorated() -> object:
        return function()

    return decorated


chunk = as_transformers_writes_it("fla", is_new_implementation=True)
recurrent = as_transformers_writes_it("fla", is_new_implementation=False)


class Layer(torch.nn.Module):
    def forward(self) -> object:
        return chunk(), recurrent()


def test_a_package_of_which_one_kernel_is_used_is_in_use():
    # An older version may lack the others.
    assert kernels_of(Layer()) == MixerKernels(used=("flash-linear-attention",), missing=())


def test_a_replaced_function_is_recognized_behind_other_decorators():
    assert is_replaced(chunk)
    assert not is_replaced(recurrent)
    assert not is_replaced(torch.relu), "a function without a closure"
