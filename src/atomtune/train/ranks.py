"""Ranks: communication between the processes of one run, and errors when one of them stops answering."""

import os
from datetime import timedelta
from typing import Any

import torch
from transformers import TrainingArguments

from atomtune.errors import RunFailed

#: Parts of messages: gloo raises a plain RuntimeError for a process that is silent or gone.
_SILENT = ("Timed out waiting", "timed out after", "Timeout waiting")
_GONE = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "gloo/transport")


def join_job(seconds: int) -> None:
    """Connect to the other processes of a job on CPUs, and set how many seconds each will wait for the others.

    transformers does this for GPUs. On CPUs it ignores the time limit, and torch waits for half an hour.
    Raises RunFailed if the others do not connect.
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
    """What happened, if another process of the job is gone or silent; "" for any other error."""
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
        return f"{place} lost its connection to another one, which has ended. Its output says why."
    return ""


def wait_for_the_first() -> None:
    """Wait until the first process of a job, which alone writes the results, has come here too.

    All ranks must call this. Raises RunFailed if one of them has ended before.
    """
    if not torch.distributed.is_initialized():
        return
    try:
        torch.distributed.barrier()
    except RuntimeError as error:
        raise RunFailed(f"another process of the job has ended, or is silent. Its output says why.\n{error}") from error


def on_any_rank(flag: bool, args: TrainingArguments) -> bool:
    """Whether the flag is True on at least one rank. All ranks must call this."""
    if args.world_size <= 1:
        return flag
    shared = torch.tensor(int(flag), device=args.device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return bool(shared.item())


def mean_over_ranks(number: float, args: TrainingArguments) -> float:
    """The mean of each rank's number. All ranks must call this."""
    if args.world_size <= 1:
        return number
    # Float32, because the number may be an int: an empty sum
    shared = torch.tensor(number, dtype=torch.float32, device=args.device)
    torch.distributed.all_reduce(shared)
    return float(shared.item() / args.world_size)


def of_all_ranks(origins: list[str], args: TrainingArguments) -> list[str]:
    """The records of all ranks, in the order of the ranks. All ranks must call this."""
    if args.world_size <= 1:
        return origins
    every: list[Any] = [None] * args.world_size  # one list per rank
    torch.distributed.all_gather_object(every, origins)
    return [origin for of_one_rank in every for origin in of_one_rank]


def is_sharded(args: TrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed holds the weights, so that no rank has all of them or can compute alone."""
    return bool(args.fsdp or args.deepspeed)


def local(gradient: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient, if it is sharded."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient
