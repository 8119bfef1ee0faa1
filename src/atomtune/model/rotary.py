"""Rotary: embeddings whose factors depend on the longest record of a batch, such as longrope.

transformers chooses the factors by the largest position in a call, so one long record changes those of all other
records (Phi-3, Phi-3.5, Phi-4-mini above 4,096 tokens). Computed one at a time, each record has its own factors.
Therefore records above and below that limit are not computed together. Ding et al. 2024, arXiv 2402.13753.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from atomtune.errors import BadSettings


def rotary_limit(config: Any) -> int | None:
    """The most tokens of a record that gets the short factors; None if the factors do not depend on the length."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # Gemma 3 has one object per kind of layer
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, Mapping)]
    limits = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((limit for limit in limits if limit), default=None)


def refuse_mixed(
    limit: int | None, longest_tokens: int, *, batches: Mapping[str, int], accumulated: int | None = None
) -> None:
    """Raise BadSettings if records above and below the limit could be in one batch.

    batches      setting → records per batch
    accumulated  batches of the first setting per optimizer step; None if there is no such step
    """
    if limit is None or longest_tokens <= limit or max(batches.values()) == 1:
        return
    flags = [f"--{name} 1" for name in batches]
    if accumulated is not None:  # the same step, from batches of one record
        flags.append(f"--gradient_accumulation_steps {next(iter(batches.values())) * accumulated}")
    raise BadSettings(
        [
            f"The longest record has {longest_tokens:,} tokens. If one record of a batch has more than {limit:,}, this "
            f"base uses other rotary factors for the whole batch (longrope). Pass {' '.join(flags)}, or "
            f"--max_seq_length {limit:,}, which shortens longer records."
        ]
    )


def split_at_limit(lengths: Sequence[int], limit: int | None) -> list[list[int]]:
    """Indices of the records that may be computed together: those up to the limit, and those above."""
    if limit is None:
        return [list(range(len(lengths)))]
    up_to = [place for place, length in enumerate(lengths) if length <= limit]
    above = [place for place, length in enumerate(lengths) if length > limit]
    return [side for side in (up_to, above) if side]
