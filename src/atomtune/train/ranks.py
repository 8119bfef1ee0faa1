"""Ranks: what the processes of one run tell each other."""

from typing import Any

import torch


def on_any_rank(flag: bool, args: Any) -> bool:
    """Whether the flag is up on one rank at least; every rank must ask."""
    if args.world_size <= 1:
        return flag
    shared = torch.tensor(int(flag), device=args.device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return bool(shared.item())


def of_all_ranks(origins: list[str], args: Any) -> list[str]:
    if args.world_size <= 1:
        return origins
    every: list[Any] = [None] * args.world_size
    torch.distributed.all_gather_object(every, origins)
    return [origin for some in every for origin in some]
