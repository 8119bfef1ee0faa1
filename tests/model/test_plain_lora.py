"""Laws of plain LoRA: PiSSA and OLoRA adapters answer as in plain PEFT, and the base stays unchanged."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from atomtune.errors import BadModel
from atomtune.model.adapter import LoraSpec, load_another, load_trained, start_from_weights
from atomtune.model.load import BaseSpec, load_base

IDS = torch.arange(3, 15)[None]
#: In float32, W - s B₀A₀ + s B A and W + s (B A - B₀A₀) differ by the order of their sums.
ROUNDING = 1e-5


def base(models, family="llama", *, quantize=None):
    return load_base(
        BaseSpec(path=str(models(family)), dtype=torch.float32, device=torch.device("cpu"), quantize=quantize)
    )


def by_transformers(models, family="llama"):
    return AutoModelForCausalLM.from_pretrained(models(family), dtype=torch.float32).eval()


def saved_by_peft(models, folder, family="llama", **settings):
    """An adapter that PEFT initialized this way, with weights far from their first values."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(by_transformers(models, family), config)
    draw = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=draw)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.double()


def far(a, b) -> float:
    """The largest difference, relative to the largest number."""
    return float((a - b).abs().max() / b.abs().max())


PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9}}
LAYERS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"init_lora_weights": "pissa", **LAYERS}),
        ("llama", {"init_lora_weights": "olora", **LAYERS}),
        ("llama", {"init_lora_weights": "pissa", "use_rslora": True, **LAYERS, **PATTERNS}),
        ("llama", {"init_lora_weights": "olora", **LAYERS, **PATTERNS}),
        ("llama", {"init_lora_weights": "pissa", "use_dora": True, **LAYERS}),
        ("llama", {"init_lora_weights": "olora", "target_modules": ["q_proj", "embed_tokens"]}),
        ("gpt2", {"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
    ids=["pissa", "olora", "rslora", "patterns", "dora", "embedding", "gpt2"],
)
def test_a_loaded_adapter_matches_peft_and_when_disabled_the_plain_base(models, tmp_path, family, settings):
    saved_by_peft(models, tmp_path, family, **settings)
    by_peft = PeftModel.from_pretrained(by_transformers(models, family), tmp_path)
    plain = logits(by_transformers(models, family))
    model = load_trained(base(models, family), tmp_path)
    assert far(logits(model), logits(by_peft)) < ROUNDING
    assert far(logits(model), plain) > 0.01, "the adapter changes something"
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    with by_peft.disable_adapter():
        assert far(logits(by_peft), plain) > 0.01, "PEFT's base without this adapter is another one"


@pytest.mark.parametrize(
    ("family", "order"),
    [
        ("llama", ("pissa", "olora", "plain")),
        ("llama", ("plain", "olora", "pissa")),
        ("llama", ("olora", "pissa")),
        ("gpt2", ("plain", "pissa")),  # its matrices are transposed, also inside the first adapter's layer
    ],
)
def test_each_of_several_adapters_answers_as_when_loaded_alone(models, tmp_path, family, order):
    layers = LAYERS if family == "llama" else {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    for name in order:
        saved_by_peft(models, tmp_path / name, family, init_lora_weights={"plain": True}.get(name, name), **layers)
    model = load_trained(base(models, family), tmp_path / order[0])
    for name in order[1:]:
        load_another(model, tmp_path / name, name)
    for name, adapter in zip(order, ["default", *order[1:]], strict=True):
        model.set_adapter(adapter)
        alone = PeftModel.from_pretrained(by_transformers(models, family), tmp_path / name)
        assert far(logits(model), logits(alone)) < ROUNDING
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(by_transformers(models, family)))


def test_training_continues_from_the_same_logits_and_saves_plain_lora(models, tmp_path):
    saved_by_peft(models, tmp_path / "before", init_lora_weights="pissa", **LAYERS)
    lora = LoraSpec(rank=4, alpha=6, dropout=0.0, targets=LAYERS["target_modules"])
    notices: list[str] = []
    file = tmp_path / "before" / "adapter_model.safetensors"
    model = start_from_weights(base(models), file, lora, notice=notices.append)
    by_peft = logits(PeftModel.from_pretrained(by_transformers(models), tmp_path / "before"))
    assert len(notices) == 1 and "initialised with pissa" in notices[0] and "rank 8" in notices[0]
    assert far(logits(model), by_peft) < ROUNDING
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(by_transformers(models)))
    model.save_pretrained(tmp_path / "after")
    again = PeftModel.from_pretrained(by_transformers(models), tmp_path / "after")
    assert again.peft_config["default"].init_lora_weights is True
    assert far(logits(again), by_peft) < ROUNDING


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa_niter_4"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "write true in place of the name"),
        pytest.param(
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
            "LoftQ changes all weights",
            marks=pytest.mark.skipif(not find_spec("scipy"), reason="PEFT reads no LoftQ adapter without scipy"),
        ),
        ({"kasa_config": {}}, "KaSA changes all weights"),
        ({"alora_invocation_tokens": [5, 6]}, "adapts only what follows certain tokens"),
        ({"arrow_config": {"top_k": 1}}, "chooses among other adapters"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers of its base"),
    ],
    ids=lambda value: next(iter(value.values()), "") if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("use", ["to answer", "beside another", "to train on"])
def test_an_adapter_whose_base_cannot_be_reconstructed_is_refused_with_reason(models, tmp_path, change, words, use):
    saved_by_peft(models, tmp_path / "plain", **LAYERS)
    folder = tmp_path / "changed"
    shutil.copytree(tmp_path / "plain", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    lora = LoraSpec(rank=4, alpha=6, dropout=0.0, targets=LAYERS["target_modules"])
    with pytest.raises(BadModel) as refused:
        if use == "to answer":
            load_trained(base(models), folder)
        elif use == "beside another":
            load_another(load_trained(base(models), tmp_path / "plain"), folder, "second")
        else:
            start_from_weights(base(models), folder / "adapter_model.safetensors", lora, notice=print)
    assert words in str(refused.value) and str(folder / "adapter_config.json") in str(refused.value)


def test_a_quantized_base_is_refused(models, tmp_path):
    pytest.importorskip("bitsandbytes")
    saved_by_peft(models, tmp_path, init_lora_weights="olora", **LAYERS)
    with pytest.raises(BadModel, match=r"are quantized\. Pass the base it was trained on, without --quantize"):
        load_trained(base(models, quantize="nf4"), tmp_path)


def test_a_target_matrix_shared_by_two_layers_is_refused(models, tmp_path):
    # PEFT would also take that part out of the embedding.
    saved_by_peft(models, tmp_path, "gpt2", init_lora_weights="pissa", target_modules=["lm_head"])
    with pytest.raises(BadModel, match="lm_head, and another layer uses the same matrix"):
        load_trained(base(models, "gpt2"), tmp_path)


def test_a_tensor_with_the_wrong_shape_is_still_named(models, tmp_path):
    saved_by_peft(models, tmp_path, init_lora_weights="pissa", **LAYERS)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    name = min(weights)
    save_file({**weights, name: weights[name][:, :-1].contiguous()}, file)
    with pytest.raises(BadModel, match=f"{name}: .* in the file"):
        load_trained(base(models), tmp_path)
