"""State: the files in which the Trainer keeps optimizer, schedule, gradient scaler and random numbers.

They are pickles (torch.save), and reading a pickle runs whatever program lies in it. The Trainer reads each of them as
tensors, numbers and words only (`weights_only`), which runs nothing; here the same is tried first, so that a file that
is no such thing is named before the run begins.
"""

import pickle
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals

from atomtune.errors import BadModel
from atomtune.model.adapter_folder import WEIGHTS

OPTIMIZER = ("optimizer.pt", "optimizer.bin")  # on one device or several that hold it all; divided by FSDP
#: Every name under which the Trainer would open a state.
_PATTERNS = (*OPTIMIZER, "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model_fsdp*.bin")

WEIGHTS_ONLY = f"Start from only its weights: --continue_training --checkpoint FOLDER/{WEIGHTS}"


def state_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that the Trainer reads by torch.load."""
    return sorted(file for pattern in _PATTERNS for file in checkpoint.glob(pattern))


def has_optimizer(checkpoint: Path) -> bool:
    """Whether an optimizer's state lies here: the Trainer's, or DeepSpeed's folder global_stepN."""
    return any((checkpoint / name).is_file() for name in OPTIMIZER) or any(checkpoint.glob("global_step*"))


def refuse_programs(checkpoint: Path) -> None:
    """Raise BadModel where a state is a program or cannot be read; nothing in it is run to find out."""
    for file in state_files(checkpoint):
        try:
            with safe_globals():  # numpy's arrays, in which the random state of numpy is kept
                torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise BadModel(
                f"{file} is damaged, or it is a program and not only tensors (a pickle). It was not run.\n"
                f"{WEIGHTS_ONLY}"
            ) from error
        except (EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise BadModel(f"{file} cannot be read: {error!r}\n{WEIGHTS_ONLY}") from error
