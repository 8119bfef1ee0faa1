"""Weighted adapters: W + sum of weight * B A, compared with sums computed here, also on quantized bases."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from atomtune.cli import main
from atomtune.model.adapter import LoraSpec, new_adapter
from atomtune.model.load import BaseSpec, load_base
from tests.export.test_merge import CPU, adapter_on

NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory):
    """Two adapters on one base, with large weights: rank 4 on all layers, and rank 2 on down_proj alone."""
    folder = tmp_path_factory.mktemp("adapters")
    base = models("llama")
    wide = adapter_on(base, folder / "wide", size=0.5)
    model = new_adapter(
        load_base(BaseSpec(path=str(base), dtype=torch.float32, device=CPU)),
        LoraSpec(rank=2, alpha=16, dropout=0.0, targets=["down_proj"]),
    )
    draw = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=draw)
    model.save_pretrained(folder / "narrow")
    for file in wide.glob("token*"):
        (folder / "narrow" / file.name).write_bytes(file.read_bytes())
    return base, wide, folder / "narrow"


def delta(adapter, name: str = NAME) -> torch.Tensor:
    """alpha / r * B A of a saved adapter, in float64; zeros if the adapter has nothing for this layer."""
    config = PeftConfig.from_pretrained(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    down, up = (tensors.get(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
    return torch.zeros(1) if down is None else config.lora_alpha / config.r * (up.double() @ down.double())


def weight_in(folder, name: str = NAME) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).get_parameter(f"{name}.weight").double()


def assert_equal(merged: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal except for sums in float32 and one rounding to it."""
    merged, expected = merged.detach(), expected.detach()
    assert torch.allclose(merged, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def merge(out, *flags: str) -> int:
    return main(["merge", "--output_dir", str(out), *flags])


def test_two_adapters_are_merged_as_their_weighted_sum(adapters, tmp_path, capsys):
    base, wide, narrow = adapters
    assert merge(tmp_path / "m", "--adapter_path", str(wide), str(narrow), "--weights", "0.7", "-0.3") == 0
    assert f"merging 0.7 × {wide} + -0.3 × {narrow}" in capsys.readouterr().out
    for name in (NAME, "model.layers.0.self_attn.q_proj"):
        expected = weight_in(base, name) + 0.7 * delta(wide, name) - 0.3 * delta(narrow, name)
        assert_equal(weight_in(tmp_path / "m", name), expected)


def test_one_adapter_can_be_merged_with_a_fractional_weight(adapters, tmp_path):
    base, wide, _ = adapters
    assert merge(tmp_path / "m", "--adapter_path", str(wide), "--weights", "0.5") == 0
    expected = weight_in(base) + 0.5 * delta(wide)
    assert_equal(weight_in(tmp_path / "m"), expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("begins", [True, False], ids=["first", "second"])
def test_pissa_and_olora_adapters_are_weighted_against_the_original_base(adapters, tmp_path, init, begins):
    base, wide, narrow = adapters
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["down_proj"], init_lora_weights=init))
    layer = model.get_submodule(f"base_model.model.{NAME}")
    layer.lora_B["default"].weight.data += 0.1
    trained = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    model.save_pretrained(tmp_path / init)
    for file in wide.glob("token*"):
        (tmp_path / init / file.name).write_bytes(file.read_bytes())
    order = [(str(tmp_path / init), "0.5"), (str(narrow), "2")]
    folders, weights = zip(*(order if begins else order[::-1]), strict=True)
    assert merge(tmp_path / "m", "--adapter_path", *folders, "--weights", *weights) == 0
    expected = weight_in(base) + 0.5 * (trained - weight_in(base)) + 2 * delta(narrow)
    assert_equal(weight_in(tmp_path / "m"), expected)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("wide", "narrow"), "--weights: missing for 2 adapters. Pass one per adapter"),
        (("wide", "narrow", "--weights", "1"), "--weights: 1 number for 2 adapters"),
        (("wide", "wide", "--weights", "1", "1"), "names a folder twice"),
        # Regression: another spelling counted as another folder, and one adapter was added twice.
        (("wide", "wide/", "--weights", "1", "1"), "names a folder twice"),
        (("wide", "narrow/../wide", "--weights", "1", "1"), "names a folder twice"),
        (("wide", "narrow", "--weights", "1", "much"), "--weights '1 much': expected numbers"),
    ],
)
def test_invalid_adapter_weights_on_the_command_line_are_refused(adapters, tmp_path, capsys, flags, words):
    _, wide, _ = adapters
    folders = [f"{wide.parent}/{flag}" if flag.startswith(("wide", "narrow")) else flag for flag in flags]
    assert merge(tmp_path / "m", "--adapter_path", *folders) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"use_dora": True}, "DoRA, which also scales the base's weights"),
        ({"modules_to_save": ["lm_head"]}, "layers that were trained in full"),
        ({"target_parameters": ["experts.down_proj"]}, "adapters of experts"),
        ({"bias": "lora_only"}, "trained biases"),
    ],
)
def test_an_adapter_that_does_more_than_add_matrices_is_refused_with_a_weight(
    adapters, tmp_path, capsys, setting, words
):
    _, wide, narrow = adapters
    other = Path(shutil.copytree(narrow, tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, **setting}))
    assert merge(tmp_path / "m", "--adapter_path", str(wide), str(other), "--weights", "1", "1") == 2
    assert f"{other} holds {words}, and cannot be added with a weight." in capsys.readouterr().err


@pytest.mark.parametrize("others", [(), ("narrow",)], ids=["alone", "beside another"])
def test_an_adapter_with_trained_token_rows_is_refused_with_a_weight(adapters, tmp_path, capsys, others):
    # PEFT inserts them in full, whatever the weight. Regression: the check accepted them as stored in full.
    base, wide, narrow = adapters
    config = LoraConfig(r=4, target_modules=["down_proj"], trainable_token_indices=[5, 7])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "rows")
    for file in wide.glob("token*"):
        (tmp_path / "rows" / file.name).write_bytes(file.read_bytes())
    folders = [str(tmp_path / "rows"), *(str(narrow.parent / other) for other in others)]
    assert merge(tmp_path / "m", "--adapter_path", *folders, "--weights", *("0.5" for _ in folders)) == 2
    assert "rows of single tokens that were trained whole, and cannot be added" in capsys.readouterr().err


def test_an_adapter_of_a_quantized_base_is_merged_into_the_dequantized_base(trained_in_nf4, tmp_path, capsys):
    base, adapter = trained_in_nf4
    assert merge(tmp_path / "m", "--adapter_path", str(adapter)) == 0
    assert "quantized and dequantized again" in " ".join(capsys.readouterr().out.split())
    plain = load_base(BaseSpec(path=str(base), dtype=torch.float32, device=CPU, quantize="nf4"))
    rounded = plain.dequantize(dtype=torch.float32).get_parameter(f"{NAME}.weight").double()
    expected = rounded + delta(adapter)
    assert not torch.allclose(rounded, weight_in(base), atol=1e-3), "nf4 rounds so much that the two bases differ"
    assert_equal(weight_in(tmp_path / "m"), expected)
    # certify compares with the same weights.
    assert main(["certify", "--adapter_path", str(adapter), "--served", str(tmp_path / "m"), "--engine", "in-process",
                 "--dtype", "float32", "--prompts", "3"]) == 0  # fmt: skip


def test_the_stored_base_flag_merges_into_the_weights_as_stored(trained_in_nf4, tmp_path, capsys):
    base, adapter = trained_in_nf4
    assert merge(tmp_path / "m", "--adapter_path", str(adapter), "--stored_base") == 0
    assert "not quite the one that was trained" in " ".join(capsys.readouterr().out.split())
    expected = weight_in(base) + delta(adapter)
    assert_equal(weight_in(tmp_path / "m"), expected)


def test_a_base_with_quantized_files_is_dequantized_for_the_merge(adapters, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    base, wide, _ = adapters
    packed = load_base(BaseSpec(path=str(base), dtype=torch.float32, device=CPU, quantize="nf4"))
    packed.save_pretrained(tmp_path / "packed")
    flags = ("--adapter_path", str(wide), "--model_path", str(tmp_path / "packed"), "--other_base")
    assert merge(tmp_path / "m", *flags) == 0
    assert "the merged model has dequantized weights" in " ".join(capsys.readouterr().out.split())
    expected = packed.dequantize(dtype=torch.float32).get_parameter(f"{NAME}.weight").double() + delta(wide)
    assert_equal(weight_in(tmp_path / "m"), expected)
    assert "quantization" not in (tmp_path / "m" / "config.json").read_text()
