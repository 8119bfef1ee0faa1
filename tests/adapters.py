"""Adapters that nothing was trained for: of a wanted size, or of any kind that PEFT has beside plain LoRA."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from atomtune.model.adapter import LoraSpec, new_adapter
from atomtune.model.load import BaseSpec, load_base

CPU = torch.device("cpu")
ATTENTION = ["q_proj", "v_proj"]
#: What PEFT puts on a model beside plain LoRA → family, and what is asked of LoraConfig.
OTHER_KINDS = {
    "dora": ("llama", {"target_modules": ATTENTION, "use_dora": True}),
    "dora-transposed": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "dora-embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embedding": ("llama", {"target_modules": [*ATTENTION, "embed_tokens"]}),
    "bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}),
    "head": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "norms": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["norm"]}),
    "tied": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "fan_in_fan_out": True}),
    "rows": ("llama", {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [5, 300]}}),
    "tied-rows": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [5, 300], "fan_in_fan_out": True}),
}


def adapter_on(base: Path, folder: Path, *, size: float, targets: Sequence[str] = ("all-linear",)) -> Path:
    """An adapter whose change of each matrix is about `size` of the matrix."""
    model = new_adapter(
        load_base(BaseSpec(path=str(base), dtype=torch.float32, device=CPU)),
        LoraSpec(rank=4, alpha=4, dropout=0.0, targets=list(targets)),
    )
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.copy_(torch.randn(a.shape, generator=draw))
            b.copy_(torch.randn(b.shape, generator=draw))
            b.mul_(size * layer.get_base_layer().weight.norm() / layer.get_delta_weight("default").norm())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def by_peft(base: Path, folder: Path, wanted: dict) -> Path:
    """An adapter of any kind, all of whose numbers are moved."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **wanted)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor), alpha=0.03)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def base_apart(adapter: Path, folder: Path, *, has_weights: bool) -> Path:
    """A copy of an adapter's base in this folder; without weights it is like a base on the hub, not downloaded yet."""
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    there = Path(shutil.copytree(base, folder))
    for file in [] if has_weights else there.glob("*.safetensors"):
        file.unlink()
    return there
