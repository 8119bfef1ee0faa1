"""Random state: keeps measurements from changing a run's random numbers."""

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Within this context random numbers may be drawn; afterwards all generators are as before.

    Even an evaluation without dropout draws some: torch's DataLoader seeds its workers from the process's generator.
    """
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    # Reading a GPU's generator would claim the GPU, which inspect and sweep leave to others.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
