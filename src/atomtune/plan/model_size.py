"""Model size: how many numbers a model has and how many of them a token meets, counted on its shape alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from atomtune.model.adapter import LoraSpec, new_adapter
from atomtune.model.base_checks import reading_text
from atomtune.model.layout_support import why_padded_by_config
from atomtune.model.load import read_config
from atomtune.model.load_errors import explained
from atomtune.model.lora_targets import match_targets
from atomtune.model.weight_sizes import without_weights

#: What configs call the number of experts, and how many of them a token meets.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts")


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The numbers of a model and its adapter.

    weights     parameters of the base, a tied matrix counted once
    quantized   those of them that --quantize reaches: linear layers, the output matrix left out
    body        multiplied with every token: no embedding, no output matrix, of the experts those that a token chooses
    head        the output matrix, which is multiplied with target tokens alone
    trained     parameters of the adapter
    shapes      (in, out) of its linear layers, each once, the output matrix left out
    why_padded  the reason for one record a row that the config or the settings give; None where a trial at the run's
                start decides
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
    """Build the model on the meta device, where a tensor is a shape, and count.

    Raises BadModel where there is no such model, BadSettings where the adapter's targets match nothing.
    """
    config = read_config(path, trust_remote_code=trust_remote_code)
    with explained(path, "model", files="config.json"):
        base = without_weights(config, trust_remote_code=trust_remote_code)
    base.requires_grad_(False)
    base.config.use_cache = False
    with reading_text(path, base):  # Kyutai's embeddings are no table
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
    """Of the weights in experts, the share that a token meets."""
    counts = [getattr(config, name) for name in EXPERT_COUNTS if getattr(config, name, None)]
    chosen = [getattr(config, name) for name in EXPERTS_CHOSEN if getattr(config, name, None)]
    return min(1.0, chosen[0] / counts[0]) if counts and chosen else 1.0
