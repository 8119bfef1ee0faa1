"""Environment: reports variables that silently change a run, left over from another job or written carelessly."""

import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from atomtune.container import cores, visible_cores

#: Variables that torchrun and other launchers set in every process of a job.
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Cache folders of the libraries; the first is the root of the others.
CACHES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "XDG_CACHE_HOME")
_LAST_PORT = 65_535
_TRUTHS = {"y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0"}
#: How often a waiting thread spins before it sleeps, about 60 microseconds. On an idle machine this is as fast as
#: libgomp's own 300,000; with another busy program beside two threads, a run took 24 s instead of 102 s (docs/log.md).
SPINS = "3000"


def let_waiting_threads_sleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep threads that wait for each other from occupying the cores. Call it before torch is imported.

    GNU OpenMP reads the variable once, when torch loads it. If the user has set one of its two variables, it is kept.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)


def keep_to_granted_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """In a container with a share of the machine's cores, compute with as many threads. Call it as the one above.

    torch starts one thread per core of the machine; beyond the share, they only stop each other.
    """
    if cores() < visible_cores():
        environment.setdefault("OMP_NUM_THREADS", str(cores()))


def is_first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process may print for its job: the only one, or the first that a launcher started."""
    return environment.get("RANK", "0") == "0"


def environment_problems(environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """A message for each variable with a value that no launcher would set."""
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        text = environment.get(name)
        if text is None:
            continue
        if text.isdecimal():
            numbers[name] = int(text)
        else:
            yield f"the environment variable {name} is {text!r}; expected a whole number. {_remedy(name)}"
    ranks = numbers.get("WORLD_SIZE", 1)
    yield from _launcher_problems(environment, ranks)
    if ranks == 0:
        yield f"the environment says WORLD_SIZE=0; a job has one process or more. {_remedy('WORLD_SIZE')}"
    elif "WORLD_SIZE" in numbers and numbers.get("RANK", 0) >= ranks:
        yield (
            f"the environment says RANK={numbers['RANK']} of WORLD_SIZE={ranks} processes, which count "
            f"from 0. {_remedy('RANK', 'WORLD_SIZE')}"
        )
    yield from _mpi_problems(environment)
    yield from _accelerate_problems(environment)


def _launcher_problems(environment: Mapping[str, str], ranks: int) -> Iterator[str]:
    """Problems if only some of a launcher's variables are set, or the port is none."""
    present = [name for name in LAUNCHER if name in environment]
    missing = [name for name in LAUNCHER if name not in environment]
    present += ["LOCAL_RANK"] if "LOCAL_RANK" in environment else []
    alone = {"MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"}.issuperset(present)  # defaults of a cluster, without a job
    if present and missing and (not alone or ranks > 1):
        listed = ", ".join(f"{name}={environment[name]}" for name in present)
        yield (
            f"the environment has {listed}, but not {', '.join(missing)}. A launcher sets all of them; these look left "
            f"over from another job. {_remedy(*present)}"
        )
    port = environment.get("MASTER_PORT", "1")
    if not missing and not (port.isdecimal() and 1 <= int(port) <= _LAST_PORT):
        yield (
            f"the environment variable MASTER_PORT is {port!r}; expected a number from 1 to {_LAST_PORT:,}. "
            f"{_remedy('MASTER_PORT')}"
        )


def _mpi_problems(environment: Mapping[str, str]) -> Iterator[str]:
    """Problems with the variables of MPI launchers: on a CPU, accelerate waits for as many processes as they say."""
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        text = environment.get(name, "1")
        if not text.isdecimal():
            yield f"the environment variable {name} is {text!r}; expected a whole number. {_remedy(name)}"
        elif int(text) > 1 and "WORLD_SIZE" not in environment:
            yield (
                f"the environment has {name}={text}, as if MPI had started {text} processes that wait for each other. "
                f"{_remedy(name)}"
            )


def _accelerate_problems(environment: Mapping[str, str]) -> Iterator[str]:
    """Problems with the variables of `accelerate launch`, which override the run's own settings."""
    if device := environment.get("ACCELERATE_TORCH_DEVICE"):
        yield (
            f"the environment has ACCELERATE_TORCH_DEVICE={device}, which sends batches to another device than the "
            "model. `unset ACCELERATE_TORCH_DEVICE`; CUDA_VISIBLE_DEVICES and --use_cpu choose the device."
        )
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if environment.get(name, "no").lower() not in _TRUTHS:
            yield f"the environment variable {name} is {environment[name]!r}; expected true or false. `unset {name}`."


def number_problems(environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Problems with variables that libraries read as numbers when they are imported; anything else makes that fail."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        text = environment.get(name)
        if text is not None and not text.strip().lstrip("+-").isdecimal():
            yield f"the environment variable {name} is {text!r}; expected a number of seconds. `unset {name}`."
    name = "HF_DATASETS_IN_MEMORY_MAX_SIZE"
    try:
        float(environment.get(name, "0"))
    except ValueError:
        yield f"the environment variable {name} is {environment[name]!r}; expected a number of bytes. `unset {name}`."


def start_problems() -> Iterator[str]:
    """Problems of how the command was started that end the process, or make an import fail."""
    try:
        Path.cwd()
    except OSError:  # torch searches for kernels from here
        yield "the folder that this command was started in no longer exists, or cannot be read. `cd` to another one."
    if sys.flags.optimize > 1:
        yield (
            "Python leaves out docstrings here (PYTHONOPTIMIZE=2 or -OO), and transformers builds its classes from "
            "them. `unset PYTHONOPTIMIZE`."
        )


def cache_notices(environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """A notice for each cache folder whose path depends on the working directory."""
    for name in CACHES:
        folder = environment.get(name, "")
        if folder and not folder.startswith("~") and not Path(folder).is_absolute():
            yield (
                f"{name} is the relative path {folder}: the cache is in {Path(folder).absolute()}, and a command that "
                "is started elsewhere will not find it. Use an absolute path."
            )


def waiting_notice(environment: Mapping[str, str] = os.environ) -> str | None:
    """A notice if all variables are set but torchrun did not set them: by another launcher, or left over. Else None."""
    if "TORCHELASTIC_RUN_ID" in environment or any(name not in environment for name in LAUNCHER):
        return None
    rank, ranks = environment["RANK"], environment["WORLD_SIZE"]
    if ranks == "1":
        return None
    return (
        f"the environment says that this is process {rank} of {ranks} (RANK, WORLD_SIZE); it waits for the others. "
        f"If they are left over from another job: `unset {' '.join(LAUNCHER)} LOCAL_RANK`."
    )


def repetition_notice(command: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """A notice if torchrun has started several processes of a command that does not share its work; else None."""
    ranks = environment.get("WORLD_SIZE", "1")
    if command == "train" or "TORCHELASTIC_RUN_ID" not in environment or ranks == "1":
        return None
    return (
        f"only train shares its work among processes: each of these {ranks} does all the work of {command}. Start it "
        "without torchrun."
    )


def _remedy(*names: str) -> str:
    return f"`unset {' '.join(names)}`, or start the job with torchrun."
