"""Plain LoRA: converts an adapter whose initialization changed the base's weights to one for the original weights.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) split W into W' + s B₀A₀ and train on W'. PEFT repeats that split
whenever it loads such an adapter, and then W' is also the base without adapter, and the base of every other adapter.
The same model on the original weights has twice the rank:

    W' + s B A  =  W + s (B A - B₀A₀)  =  W + s [B, -B₀] [A; A₀]
"""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from atomtune.errors import BadModel
from atomtune.model.adapter_keys import module_of
from atomtune.model.causal_lm import CausalLM

#: Initializations whose B₀A₀ can be computed from the base's weights alone.
_RECOMPUTED = ("pissa", "olora")
#: Initializations whose B₀A₀ depends on random numbers, data or gradients. Half of it differed between two loads of
#: pissa_niter_4. PEFT loads lora_ga without subtracting anything.
_LOST = ("pissa_niter", "corda", "lora_ga")
#: Dtypes that can be decomposed; weights of other dtypes are packed.
_UNPACKED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain_lora(
    base: CausalLM, config: PeftConfig, weights: Mapping[str, torch.Tensor], file: Path
) -> dict[str, torch.Tensor]:
    """The adapter's tensors for the original base; if its initialization changed the base, `config` is changed too.

    weights  A [r, in] and B [out, r] of each layer; if the initialization changed the base, [2 r, in] and [out, 2 r]
             are returned
    file     path of the config, for messages

    Raises BadModel if the base was changed in a way that cannot be computed again. A tensor that does not fit the base
    is left as it is, and reported when the adapter is filled.
    """
    plain = dict(weights)
    if not isinstance(config, LoraConfig) or not _changed_base(config, file):
        return plain
    shared = _shared_matrices(base)
    for name, down in weights.items():
        up_name = name.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B")
        if up_name == name or up_name not in weights:
            continue
        up, module = weights[up_name], module_of(name)
        layer = _adapted_layer(base, module)
        if layer is None or not down.ndim == up.ndim == 2:
            continue
        if not isinstance(layer, nn.Embedding):
            _refuse_unknown(layer, module, config, shared, file)
        first_down, first_up = _initial_factors(layer, config, module, rank=len(down))
        if (first_down.shape, first_up.shape) == (down.shape, up.shape):
            plain[name] = torch.cat([down, first_down])
            plain[up_name] = torch.cat([up, -first_up], dim=1)
    _double_rank(config)
    return plain


def _changed_base(config: LoraConfig, file: Path) -> bool:
    """Whether the initialization changed the base's weights. Raises BadModel if the change cannot be computed again."""
    init = str(config.init_lora_weights).lower()
    if init.startswith(_LOST):
        raise BadModel(
            f"{file}: init_lora_weights is {init}. It took a part out of the base's weights before training, which "
            "cannot be reconstructed from the files.\n"
            "Save the adapter again where it was trained, with PEFT's path_initial_model_for_weight_conversion. If "
            "your base was saved without that part, write true in place of the name."
        )
    if init == "loftq" or getattr(config, "kasa_config", None) is not None:
        name = "LoftQ" if init == "loftq" else "KaSA"
        raise BadModel(
            f"{file}: {name} changes all weights of the layers it adapts, so the original base is not available "
            "together with this adapter.\n"
            "Merge it with PEFT (merge_and_unload) and pass the merged model."
        )
    return init in _RECOMPUTED


def _shared_matrices(base: CausalLM) -> set[int]:
    """Ids of the parameters that more than one layer uses."""
    holders = Counter(id(weight) for module in base.modules() for weight in module.parameters(recurse=False))
    return {number for number, count in holders.items() if count > 1}


def _adapted_layer(base: CausalLM, module: str) -> nn.Module | None:
    """The base's own layer, without another adapter's wrapper; None if the base has no layer of this name."""
    try:
        layer = base.get_submodule(module)
    except AttributeError:
        return None
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def _refuse_unknown(layer: nn.Module, module: str, config: LoraConfig, shared: set[int], file: Path) -> None:
    """Raise BadModel for a layer whose matrix cannot be decomposed, or not in the way training did it."""
    init, weight = config.init_lora_weights, getattr(layer, "weight", None)
    if weight is None or weight.dtype not in _UNPACKED:
        raise BadModel(
            f"{file}: init_lora_weights is {init}, which is computed from the base's weights, and those of {module} "
            "are quantized. Pass the base it was trained on, without --quantize."
        )
    if id(weight) in shared:
        raise BadModel(
            f"{file}: init_lora_weights is {init}, which changed {module}, and another layer uses the same "
            "matrix.\n"
            "Save the adapter again where it was trained, with PEFT's path_initial_model_for_weight_conversion."
        )


def _initial_factors(
    layer: nn.Module, config: LoraConfig, module: str, *, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A₀ [r, in] and B₀ [out, r]: the initial adapter, which was subtracted from the layer's weights."""
    if isinstance(layer, nn.Embedding):  # PEFT does not change the weights of embeddings
        return torch.zeros(rank, layer.num_embeddings), torch.zeros(layer.embedding_dim, rank)
    matrix = layer.get_parameter("weight").detach().float()
    if str(config.init_lora_weights).lower() == "olora":
        q, r = torch.linalg.qr(matrix)
        return r[:rank].cpu(), q[:, :rank].cpu()
    alphas = config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    u, s, vh = torch.linalg.svd(matrix.T if isinstance(layer, Conv1D) else matrix, full_matrices=False)
    return vh[:rank].cpu(), (u[:, :rank] * s[:rank] / scaling).cpu()


def _double_rank(config: LoraConfig) -> None:
    """Double the rank and keep the scaling, which is alpha / r, or alpha / √r with rsLoRA."""
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha = factor * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    config.init_lora_weights = True
