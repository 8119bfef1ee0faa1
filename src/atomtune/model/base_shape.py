"""Base shape: what a base's config says before its weights are loaded: its width and its longest record."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from atomtune.choices import SHORTEST_RECORD
from atomtune.errors import BadModel, BadSettings
from atomtune.model.load import device_in_use
from atomtune.model.memory import input_bytes, layer_bytes, machine_bytes
from atomtune.model.rotary import rotary_limit

#: Used if neither the config nor memory sets a limit. More tokens than any base of today reads.
NO_LIMIT = 2**20
#: Bytes per element. float32 is assumed, whatever the run's dtype is.
_ELEMENT = 4
#: Share of the memory for the activations of one record; the base's weights take most of the rest.
_USABLE = 0.5
#: A machine that can load the base can compute at least this many tokens.
_LEAST = 256


@dataclass(frozen=True)
class BaseShape:
    """What a run's defaults are derived from.

    width         of the hidden states; None if the config does not say
    longest       tokens of the longest record
    longest_why   what sets that limit, as words for a message
    rotary_limit  tokens above which a record, and its whole batch, gets other rotary factors; None if factors are fixed
    """

    width: int | None
    longest: int
    longest_why: str
    rotary_limit: int | None = None


def base_shape(path: str, *, trust_remote_code: bool = False, use_cpu: bool = False) -> BaseShape:
    """Read from the config. If the config cannot be read, no limit is set here; loading the base reports the error.

    use_cpu  whether the run computes on the CPU although there is a GPU
    Raises BadModel if the base has fewer positions than the shortest record needs.
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
        longest, why = in_memory, f"this machine's memory allows {in_memory:,} tokens"
    elif positions >= NO_LIMIT:
        longest, why = NO_LIMIT, "the base sets no limit"
    else:
        longest, why = positions, f"the base has {positions:,} positions"
    return BaseShape(width, longest, why, rotary_limit(text))


def positions_of(config: Any) -> int | None:
    """How many tokens a model has positions for; None if its config sets no limit (XLNet's says -1)."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if positions and positions > 0 else None


def refuse_too_few_positions(config: Any, longest_tokens: int) -> None:
    """Raise BadSettings if a model has fewer positions than the longest example has tokens."""
    positions = positions_of(config)
    if positions and longest_tokens > positions:
        raise BadSettings(
            [
                f"The longest example has {longest_tokens} tokens; this model has {positions} positions.\n"
                f"Pass --max_seq_length {positions} or less."
            ]
        )


def tokens_in_memory(config: Any, memory_bytes: int) -> int:
    """Tokens of the longest record whose activations fit in memory if every layer is recomputed; a power of two.

    Kept per token: the inputs of all layers, and all activations of the widest one. `memory_bytes` is the total memory,
    not the free part, and the result is rounded down, so that two runs on one machine get the same limit.
    """
    widest = max(layer_bytes(config, element_bytes=_ELEMENT))
    token_bytes = input_bytes(config, tokens=1, element_bytes=_ELEMENT) + widest
    if not token_bytes:
        return NO_LIMIT
    fitting = int(_USABLE * memory_bytes / token_bytes)
    power_of_two = 2 ** (fitting.bit_length() - 1) if fitting else 0
    return min(max(power_of_two, _LEAST), NO_LIMIT)


def _device_memory(*, use_cpu: bool) -> int | None:
    """Total memory of the device in bytes; None if the system does not report it."""
    if torch.cuda.is_available() and not use_cpu:
        return int(torch.cuda.get_device_properties(device_in_use()).total_memory)
    return machine_bytes()
