"""Environment: variables left over from another job, said before they make a run wait for processes that never come."""

import os
from collections.abc import Iterator, Mapping

#: What torchrun and other launchers set in every process of a job.
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment_problems(environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """A line for each variable that no launcher would have set so."""
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        text = environment.get(name)
        if text is None:
            continue
        if text.isdecimal():
            numbers[name] = int(text)
        else:
            yield f"the environment variable {name} is {text!r}; expected a whole number. {_remedy(name)}"
    present = [name for name in LAUNCHER if name in environment]
    missing = [name for name in LAUNCHER if name not in environment]
    if present and missing and ("RANK" in present or numbers.get("WORLD_SIZE", 1) > 1):
        listed = ", ".join(f"{name}={environment[name]}" for name in present)
        yield (
            f"the environment has {listed}, but not {', '.join(missing)}. A launcher sets all of them; these look left "
            f"over from another job. {_remedy(*present)}"
        )
    ranks = numbers.get("WORLD_SIZE")
    if ranks == 0:
        yield f"the environment says WORLD_SIZE=0; a job has one process or more. {_remedy('WORLD_SIZE')}"
    elif ranks is not None and numbers.get("RANK", 0) >= ranks:
        yield (
            f"the environment says RANK={numbers['RANK']} of WORLD_SIZE={ranks} processes, which count "
            f"from 0. {_remedy('RANK', 'WORLD_SIZE')}"
        )


def waiting_notice(environment: Mapping[str, str] = os.environ) -> str | None:
    """Said where all variables are there and torchrun did not set them: another launcher did, or they are leftovers."""
    if "TORCHELASTIC_RUN_ID" in environment or any(name not in environment for name in LAUNCHER):
        return None
    rank, ranks = environment["RANK"], environment["WORLD_SIZE"]
    if ranks == "1":
        return None
    return (
        f"the environment says that this is process {rank} of {ranks} (RANK, WORLD_SIZE); it waits for the others. "
        f"If they are left over from another job: `unset {' '.join(LAUNCHER)} LOCAL_RANK`."
    )


def _remedy(*names: str) -> str:
    return f"`unset {' '.join(names)}`, or start the job with torchrun."
