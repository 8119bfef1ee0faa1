"""Ranks: what the processes of one run tell each other."""

from typing import Any

import torch
from transformers import TrainingArguments


def on_any_rank(flag: bool, args: TrainingArguments) -> bool:
    """Whether the flag is up on one rank at least; every rank must ask."""
    if args.world_size <= 1:
        return flag
    shared = torch.tensor(int(flag), device=args.device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return bool(shared.item())


def of_all_ranks(origins: list[str], args: TrainingArguments) -> list[str]:
    """The records that any rank names; every rank must ask."""
    if args.world_size <= 1:
        return origins
    every: list[Any] = [None] * args.world_size  # a list of every rank
    torch.distributed.all_gather_object(every, origins)
    return [origin for of_one_rank in every for origin in of_one_rank]
