"""Program state: a function of the library leaves the program that calls it as it was."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

import datasets
import huggingface_hub
import torch
import transformers

from atomtune.hub_reach import tried_again_afterwards
from atomtune.model.failures import explained_failure
from atomtune.train.random_state import random_state_kept


@contextlib.contextmanager
def program_state_kept() -> Iterator[None]:
    """Within this context code runs as a command of its own would, whatever the program has set.

    Afterwards random numbers, the libraries' messages and the state of the hub are the program's own again.
    Raises the error that the command would report, if a path, the disk, the memory or a kernel fails.
    """
    # The program may be computing without gradients. inference_mode(False) enables them as well.
    with random_state_kept(), _messages_kept(), tried_again_afterwards(), torch.inference_mode(False):
        try:
            yield
        except Exception as error:
            if answer := explained_failure(error):
                raise answer from error
            raise


@contextlib.contextmanager
def _messages_kept() -> Iterator[None]:
    """Within this context the libraries may be silenced; afterwards they print what they printed before."""
    of_transformers, of_hub = transformers.utils.logging, huggingface_hub.utils
    accelerate = logging.getLogger("accelerate")
    levels = (
        (of_transformers.set_verbosity, of_transformers.get_verbosity()),
        (datasets.logging.set_verbosity, datasets.logging.get_verbosity()),
        (accelerate.setLevel, accelerate.level),
    )
    # Those of the hub come last, because transformers switches them together with its own.
    bars = (
        (
            of_transformers.is_progress_bar_enabled(),
            of_transformers.enable_progress_bar,
            of_transformers.disable_progress_bar,
        ),
        (not datasets.are_progress_bars_disabled(), datasets.enable_progress_bars, datasets.disable_progress_bars),
        (not of_hub.are_progress_bars_disabled(), of_hub.enable_progress_bars, of_hub.disable_progress_bars),
    )
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for set_level, level in levels:
            set_level(level)
        for were_shown, show, hide in bars:
            if were_shown:
                show()
            else:
                hide()
