"""Attention in use: which of transformers' attention functions each part of a model uses, so that it can be restored.

In a model with towers each part has its own setting, and not every tower supports every function: VibeVoice's tower
uses `eager` in a model that uses `sdpa`. Setting one name for the whole model raises there, with half the parts set.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class AttentionInUse:
    """The attention function of each part; None for a part without attention (Fun-ASR Nano's adaptor)."""

    names: tuple[tuple[Any, str | None], ...]  # (config of a part, function name)

    @classmethod
    def of(cls, model: nn.Module) -> "AttentionInUse":
        """Read the settings of all parts, including parts that the config of the whole model does not list."""
        configs: dict[int, Any] = {}
        for part in model.modules():
            for config in _configs_of(getattr(part, "config", None)):
                configs[id(config)] = config
        return cls(tuple((config, config._attn_implementation) for config in configs.values()))

    def give_back(self) -> None:
        """Restore the settings. transformers' own setter would check again what each part supports."""
        for config, name in self.names:
            config._attn_implementation_internal = name  # the public attribute would also change all sub-configs


def _configs_of(config: Any) -> Iterator[Any]:
    if isinstance(config, PreTrainedConfig):
        yield config
        for name in config.sub_configs:
            yield from _configs_of(getattr(config, name, None))
