"""Base shape: what a base's config tells before its weights are loaded: its width, and the longest record it bears."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from atomtune.choices import SHORTEST_RECORD
from atomtune.errors import BadModel
from atomtune.model.load import device_in_use
from atomtune.model.memory import machine_bytes
from atomtune.model.rotary import rotary_limit

#: Where neither config nor memory says less. More tokens than any base of today reads.
NO_LIMIT = 2**20
#: Bytes of an element, whatever the run's own format is: float32.
_ELEMENT = 4
#: Part of the memory that the activations of one record may take; the base's weights are the larger rest.
_USABLE = 0.5
#: A machine that loads the base at all bears this many tokens.
_LEAST = 256


@dataclass(frozen=True)
class BaseShape:
    """What the defaults of a run follow from.

    width         of the hidden states; None where the config does not say
    longest       tokens of the longest record
    longest_why   what sets that limit
    rotary_limit  tokens above which a record has other rotary factors, and all of its batch with it; None: there are
                  no others
    """

    width: int | None
    longest: int
    longest_why: str
    rotary_limit: int | None = None


def base_shape(path: str, *, trust_remote_code: bool = False, use_cpu: bool = False) -> BaseShape:
    """From the config. A base whose config cannot be read is refused later, when it is loaded.

    use_cpu  whether a run computes on the CPU though there is a GPU
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        return BaseShape(None, NO_LIMIT, "the base sets no limit")
    text = config.get_text_config()
    width = getattr(text, "hidden_size", None)
    positions = positions_of(config) or NO_LIMIT
    if positions < SHORTEST_RECORD:
        raise BadModel(f"{path} has {positions:,} positions; a record needs {SHORTEST_RECORD} or more.")
    memory = _device_memory(use_cpu=use_cpu)
    in_memory = positions if memory is None else tokens_in_memory(text, memory)
    if in_memory < positions:
        return BaseShape(width, in_memory, f"this machine's memory allows {in_memory:,} tokens", rotary_limit(text))
    if positions >= NO_LIMIT:
        return BaseShape(width, NO_LIMIT, "the base sets no limit", rotary_limit(text))
    return BaseShape(width, positions, f"the base has {positions:,} positions", rotary_limit(text))


def positions_of(config: Any) -> int | None:
    """How many tokens a model has positions for; None where its config sets no limit, for which XLNet's says -1."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    return positions if positions and positions > 0 else None


def tokens_in_memory(config: Any, memory_bytes: int) -> int:
    """Tokens of one record whose activations fit when they are recomputed layer by layer: a power of two.

    Kept for each token: the input of every layer, and all of one layer (memory.py has the parts). Of the whole memory,
    used or not, and rounded down to a power of two, so that two runs on a machine cut alike.
    """
    hidden = getattr(config, "hidden_size", 0) or 0
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    if isinstance(inner, list | tuple):  # Gemma 3n: a width for each layer
        inner = max(inner)
    layers = getattr(config, "num_hidden_layers", 0) or 0
    token_bytes = (layers * hidden + 11 * hidden + 4 * inner) * _ELEMENT
    if not token_bytes:
        return NO_LIMIT
    fitting = int(_USABLE * memory_bytes / token_bytes)
    power_of_two = 2 ** (fitting.bit_length() - 1) if fitting else 0
    return min(max(power_of_two, _LEAST), NO_LIMIT)


def _device_memory(*, use_cpu: bool) -> int | None:
    """All memory of the device, in bytes; None where the system does not tell."""
    if torch.cuda.is_available() and not use_cpu:
        return int(torch.cuda.get_device_properties(device_in_use()).total_memory)
    return machine_bytes()
