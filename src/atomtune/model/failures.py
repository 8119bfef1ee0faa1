"""Failures: errors while a model computes that nothing below has explained: out of memory, or a package's kernels."""

from atomtune.errors import AtomtuneError, BadModel, RunFailed
from atomtune.model.memory import is_out_of_memory
from atomtune.model.mixer_kernels import package_that_raised


def of_the_model(error: BaseException) -> AtomtuneError | None:
    """The error to report instead, with a remedy; None for any other error."""
    if is_out_of_memory(error):
        return RunFailed(
            "Out of memory. What helps, in order: --quantize nf4 (a quarter of the memory), --dtype bfloat16, "
            "--device_map auto, shorter texts, a smaller model."
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
