"""Attention in use: which of transformers' attention functions each part of a model has, to be given back as it was.

A checkpoint with towers has one for each part, and not every tower can have each: VibeVoice's is computed by `eager`
in a model that uses `sdpa`. The one name of the whole, set for all parts, raises there, with half of them set.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class AttentionInUse:
    """The name of each part's attention; None where a part has none (Fun-ASR Nano's adaptor)."""

    names: tuple[tuple[Any, str | None], ...]  # a config, and its name

    @classmethod
    def of(cls, model: nn.Module) -> "AttentionInUse":
        """Of all parts, whether the config of the whole knows them or not."""
        configs = {id(config): config for part in model.modules() for config in _configs_of(getattr(part, "config", 0))}
        return cls(tuple((config, config._attn_implementation) for config in configs.values()))

    def give_back(self) -> None:
        """As it was. transformers' way to set one is not the way back: it asks again whether each part can have it."""
        for config, name in self.names:
            config._attn_implementation_internal = name  # the name without `_internal` sets all parts below too


def _configs_of(config: Any) -> Iterator[Any]:
    if isinstance(config, PreTrainedConfig):
        yield config
        for name in config.sub_configs:
            yield from _configs_of(getattr(config, name, None))
