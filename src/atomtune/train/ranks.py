"""Ranks: what the processes of one run tell each other, and what is said when one of them no longer answers."""

import os
from datetime import timedelta
from typing import Any

import torch
from transformers import TrainingArguments

from atomtune.errors import RunFailed

#: gloo has no class of its own for a process that is gone or silent; these words stand in its RuntimeError.
_SILENT = ("Timed out waiting", "timed out after", "Timeout waiting")
_GONE = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "gloo/transport")


def join_job(seconds: int) -> None:
    """Meet the other processes of a job that computes on CPUs, each of which then waits this long for the others.

    transformers does this for GPUs; on CPUs it passes the time limit on to nobody, and torch waits for half an hour.
    Raises RunFailed where the others do not come.
    """
    launched = "LOCAL_RANK" in os.environ and "RANK" in os.environ
    if not launched or torch.distributed.is_initialized() or torch.distributed.is_mpi_available():
        return
    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    except RuntimeError as error:
        rank, ranks = os.environ["RANK"], os.environ.get("WORLD_SIZE", "1")
        raise RunFailed(
            f"process {rank} waited {seconds} s (--ddp_timeout) for the others of its job; not all {ranks} came.\n"
            f"{error}"
        ) from error


def lost_processes(error: BaseException, args: TrainingArguments) -> str:
    """What happened where another process of the job is gone or silent; "" for any other error."""
    text = str(error)
    if args.world_size <= 1 or not isinstance(error, RuntimeError):
        return ""
    place = f"process {args.process_index} of {args.world_size}"
    if any(words in text for words in _SILENT):
        return (
            f"{place} waited {args.ddp_timeout} s (--ddp_timeout) for the others: one of them hangs, was stopped, or "
            "needs longer."
        )
    if isinstance(error, torch.distributed.DistError) or any(words in text for words in _GONE):
        return f"{place} lost its connection to another one, which has ended. The cause is in what that one said."
    return ""


def on_any_rank(flag: bool, args: TrainingArguments) -> bool:
    """Whether the flag is up on one rank at least; every rank must ask."""
    if args.world_size <= 1:
        return flag
    shared = torch.tensor(int(flag), device=args.device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return bool(shared.item())


def mean_over_ranks(number: float, args: TrainingArguments) -> float:
    """The mean of what the ranks have each; every rank must ask."""
    if args.world_size <= 1:
        return number
    shared = torch.tensor(number, dtype=torch.float32, device=args.device)  # a sum of nothing is an int
    torch.distributed.all_reduce(shared)
    return float(shared.item() / args.world_size)


def of_all_ranks(origins: list[str], args: TrainingArguments) -> list[str]:
    """The records that any rank names; every rank must ask."""
    if args.world_size <= 1:
        return origins
    every: list[Any] = [None] * args.world_size  # a list of every rank
    torch.distributed.all_gather_object(every, origins)
    return [origin for of_one_rank in every for origin in of_one_rank]


def local(gradient: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient that is divided among ranks."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient
