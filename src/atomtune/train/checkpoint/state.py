"""State: the files in which the Trainer keeps optimizer, schedule, gradient scaler and random numbers.

They are pickles (torch.save), and a pickle can contain code that runs when it is read. The Trainer reads them with
`weights_only`, which accepts only tensors, numbers and text and runs nothing. Here the files are read that way first,
so that a bad one is reported before the run begins.
"""

import pickle
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals

from atomtune.errors import BadModel
from atomtune.model.adapter_folder import WEIGHTS

OPTIMIZER = ("optimizer.pt", "optimizer.bin")  # on one device or several with full copies; FSDP's sharded state
#: All names under which the Trainer opens a state file.
_PATTERNS = (*OPTIMIZER, "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model_fsdp*.bin")

WEIGHTS_ONLY = f"Start from only its weights: --continue_training --checkpoint FOLDER/{WEIGHTS}"


def state_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that the Trainer reads with torch.load."""
    return sorted(file for pattern in _PATTERNS for file in checkpoint.glob(pattern))


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint has an optimizer's state: the Trainer's file, or DeepSpeed's folder global_stepN."""
    return any((checkpoint / name).is_file() for name in OPTIMIZER) or any(checkpoint.glob("global_step*"))


def refuse_programs(checkpoint: Path) -> None:
    """Raise BadModel if a state file contains code or cannot be read; no code in it is run."""
    for file in state_files(checkpoint):
        try:
            with safe_globals():  # allows numpy arrays, in which numpy's random state is stored
                torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise BadModel(
                f"{file} is damaged, or it is a program and not only tensors (a pickle). It was not run.\n"
                f"{WEIGHTS_ONLY}"
            ) from error
        except (EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise BadModel(f"{file} cannot be read: {error!r}\n{WEIGHTS_ONLY}") from error
