"""Rotary: positions whose factors follow from the longest record of a batch, as those of longrope do.

transformers looks at the largest position of a call: one long record gives all beside it the factors of long ones
(Phi-3, Phi-3.5, Phi-4-mini from 4,096 tokens on). One record at a time each has its own, so records on both sides of
that limit are not computed together. Ding et al. 2024, arXiv 2402.13753.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from atomtune.errors import BadSettings


def rotary_limit(config: Any) -> int | None:
    """The most tokens of a record that has the factors of short ones; None where all have the same."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, Mapping)]  # Gemma 3 names one for each kind
    limits = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((limit for limit in limits if limit), default=None)


def refuse_mixed(
    limit: int | None, longest_tokens: int, *, batches: Mapping[str, int], accumulated: int | None = None
) -> None:
    """Raise BadSettings where records on both sides of the limit could meet in a batch.

    batches      setting → records in a batch
    accumulated  batches of the first setting that make a step; None where none is made
    """
    if limit is None or longest_tokens <= limit or max(batches.values()) == 1:
        return
    flags = [f"--{name} 1" for name in batches]
    if accumulated is not None:  # the same step, of one record at a time
        flags.append(f"--gradient_accumulation_steps {next(iter(batches.values())) * accumulated}")
    raise BadSettings(
        [
            f"The longest record has {longest_tokens:,} tokens. If one record of a batch has more than {limit:,}, this "
            f"base uses other rotary factors for the whole batch (longrope). Pass {' '.join(flags)}, or "
            f"--max_seq_length {limit:,}, which shortens longer records."
        ]
    )


def apart(lengths: Sequence[int], limit: int | None) -> list[list[int]]:
    """Places of the records that may be computed together: those up to the limit, and those above."""
    if limit is None:
        return [list(range(len(lengths)))]
    sides = ([place for place, length in enumerate(lengths) if (length > limit) is above] for above in (False, True))
    return [side for side in sides if side]
