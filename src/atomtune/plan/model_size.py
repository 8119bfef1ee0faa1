"""Model size: how many weights a model has and how many a token is multiplied with, counted without loading them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from atomtune.choices import MODEL_CONFIG
from atomtune.model.adapter import LoraSpec, new_adapter
from atomtune.model.base_checks import reading_text
from atomtune.model.layout_support import why_padded_by_config
from atomtune.model.load import read_config
from atomtune.model.load_errors import explained
from atomtune.model.lora_targets import match_targets
from atomtune.model.weight_sizes import without_weights

#: Names in configs for the number of experts, and for the number of experts that a token is sent to.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts")


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Numbers of weights of a model and its adapter.

    weights     of the base; tied matrices are counted once
    quantized   those that --quantize quantizes: the linear layers without the output matrix
    body        those that each token is multiplied with: without embedding and output matrix, and of the experts only
                as many as a token is sent to
    head        the output matrix, which only target tokens are multiplied with
    trained     of the adapter
    shapes      the distinct (in, out) of the linear layers, without the output matrix
    why_padded  why the config or the settings require padded rows; None if a trial at the start of the run decides
    """

    config: Any
    weights: int
    quantized: int
    body: int
    head: int
    trained: int
    shapes: frozenset[tuple[int, int]] = frozenset()
    why_padded: str | None = None

    @property
    def text(self) -> Any:
        """The config of the text model."""
        return self.config.get_text_config()

    @property
    def layers(self) -> int:
        return int(getattr(self.text, "num_hidden_layers", 0))


def measure(path: str, lora: LoraSpec, *, trust_remote_code: bool = False) -> ModelSize:
    """Build the model on the meta device, where tensors have shapes but no data, and count its weights.

    Raises BadModel if there is no such model, BadSettings if the adapter's targets match no module.
    """
    config = read_config(path, trust_remote_code=trust_remote_code)
    with explained(path, "model", files=MODEL_CONFIG):
        base = without_weights(config, trust_remote_code=trust_remote_code)
    base.requires_grad_(False)
    base.config.use_cache = False
    with reading_text(path, base):  # turns an error into BadModel: Kyutai's embeddings are not a single table
        embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    outside = {id(weight) for part in (embeddings, head) if part is not None for weight in part.parameters()}
    chosen = _share_of_experts(config.get_text_config())
    body = 0.0
    for name, weight in base.named_parameters():
        if id(weight) not in outside:
            body += weight.numel() * (chosen if ".experts." in name else 1)
    linear = [module for module in base.modules() if isinstance(module, nn.Linear) and module is not head]
    shapes = frozenset((module.in_features, module.out_features) for module in linear)
    weights, quantized = _count(base.parameters()), _count(module.weight for module in linear)

    match_targets(base, lora.targets)
    with torch.device("meta"):
        model = new_adapter(base, lora)
    return ModelSize(
        config=config,
        weights=weights,
        quantized=quantized,
        body=round(body),
        head=0 if head is None else _count(head.parameters()),
        trained=_count(weight for weight in model.parameters() if weight.requires_grad),
        shapes=shapes,
        why_padded=why_padded_by_config(base),
    )


def _count(weights: Iterable[torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _share_of_experts(config: Any) -> float:
    """The share of the experts that a token is sent to; 1.0 for a model without experts."""
    counts = [getattr(config, name) for name in EXPERT_COUNTS if getattr(config, name, None)]
    chosen = [getattr(config, name) for name in EXPERTS_CHOSEN if getattr(config, name, None)]
    return min(1.0, chosen[0] / counts[0]) if counts and chosen else 1.0
