"""Failures: errors that nothing below has explained: of a path, the disk, the memory, or a package's kernels."""

from atomtune.disk import disk_failed, place_problem, sharing_problem
from atomtune.errors import AtomtuneError, BadModel, BadSettings, RunFailed
from atomtune.model.memory import is_out_of_memory
from atomtune.model.mixer_kernels import package_that_raised


def explained_failure(error: Exception) -> AtomtuneError | None:
    """The error to report in place of one that a command or a function did not explain; None if it is a bug."""
    if isinstance(error, AtomtuneError):
        return None
    if problem := place_problem(error):
        return BadSettings([f"{problem} Use another path, or fix what is there."])
    if problem := sharing_problem(error):
        return RunFailed(problem)
    if disk_failed(error):
        return RunFailed(f"The disk is full or failing: {error}\nFree some space, then try again.")
    return of_the_model(error)


def of_the_model(error: BaseException) -> AtomtuneError | None:
    """The same for an error while a model computes."""
    if is_out_of_memory(error):
        return RunFailed(
            "Out of memory. What helps, in order, where the command has the flag: --quantize nf4 (a quarter of the "
            "memory), --dtype bfloat16, --device_map auto; else shorter texts, a smaller model."
        )
    if package := package_that_raised(error):
        return BadModel(
            f"{package} cannot compute this model on this machine. Its error:\n  {error}\n"
            f"Do what it says, or remove it (pip uninstall {package}): transformers' own torch code is used then."
        )
    if package_that_raised(error, {"bitsandbytes": "bitsandbytes"}):
        return BadModel(
            f"bitsandbytes cannot compute this model's quantized weights on this machine. Its error:\n  {error}\n"
            "Try the other --quantize value (nf4 or int8), or leave --quantize out (chat, web and evaluate: pass "
            "--stored_base)."
        )
    return None
