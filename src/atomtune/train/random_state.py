"""Random state: what measures a run draws no number of it."""

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Numbers drawn inside leave those that training draws afterwards as they were.

    Even an evaluation without dropout draws some: torch's DataLoader seeds its workers from the process's own numbers.
    """
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
