"""Attention in use: which of transformers' attention functions each part of a model has, to be set again as it was.

A checkpoint with towers has one for each part, and not every tower can have each: VibeVoice's is computed by `eager`
in a model that uses `sdpa`. The one name of the whole, set for all parts, raises there, with half of them set.
"""

from typing import Any


def attention_in_use(config: Any) -> str | dict[str, Any]:
    """What `set_attn_implementation` takes: a name, or one for each part of the config and "" for the whole.

    A part without attention of its own has none (Fun-ASR Nano's adaptor).
    """
    # There is a public way to set an attention and none to ask which one is set.
    names = {"": config._attn_implementation}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        names[name] = attention_in_use(part) if part is not None else None
    given = {name: attention for name, attention in names.items() if attention is not None}
    return given if given.keys() - {""} else config._attn_implementation
