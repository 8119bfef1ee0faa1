"""Load errors: errors of a library that read a model, turned into a BadModel that says what to do."""

import contextlib
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from atomtune.disk import expanded
from atomtune.errors import AtomtuneError, BadModel
from atomtune.hub_reach import OFFLINE_BY_CHOICE, endpoint_shown, stay_offline_if_unreachable
from atomtune.model.failures import of_the_model
from atomtune.model.json_files import is_lfs_pointer

#: Errors that mean the hub did not answer.
_UNREACHABLE = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
#: Errors of the HTTP library that mean the same. By name, because the hub library uses httpx or httpx2.
_TRANSPORT_ERRORS = {"ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError"}
#: The error of a library in Rust that panicked. It is not an Exception, and its class cannot be imported.
_PANIC = "PanicException"
_SHOWN_CHARACTERS = 600


class explained:
    """Within this context, errors of a loader become a BadModel with a remedy.

    what      "model", "tokenizer" or "adapter"
    files     names of the files that the loader reads, for the message
    sentence  first line for an error without a remedy of its own, followed by the library's message
    """

    def __init__(self, path: str, what: str, *, files: str = "", sentence: str = "") -> None:
        self.path, self.what, self.sentence = path, what, sentence
        if files and expanded(path).is_dir():
            self.sentence = f"the library that reads {files} refuses what it found there."

    def __enter__(self) -> None:
        if _looks_local(self.path) and not expanded(self.path).is_dir():
            raise BadModel(f"{self.path}: no such folder. Pass --model_path with a model's folder or its hub name.")
        if not expanded(self.path).exists():  # a name on the hub
            stay_offline_if_unreachable()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, AtomtuneError) or of_the_model(error):
            return
        if isinstance(error, Exception) or is_panic(error):
            raise BadModel(f"{self.path}: {_remedy(self.path, self.what, self.sentence, error)}") from error


@contextlib.contextmanager
def rust_silenced() -> Iterator[None]:
    """Within this context, standard error is discarded: Rust libraries print panics there, which we report anyway."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust (tokenizers, safetensors) panicked; such an error is not an Exception."""
    return type(error).__name__ == _PANIC


def refuse_lfs_pointers(files: list[Path]) -> None:
    """Raise BadModel if git-lfs left pointers in place of the files of a cloned repository."""
    pointers = [file for file in files if is_lfs_pointer(file)]
    if pointers:
        folder = pointers[0].parent
        raise BadModel(
            f"{folder}: {', '.join(file.name for file in pointers[:3])} is a git-lfs pointer, not the weights.\n"
            f"Fetch the weights: git lfs install && git -C {quote(str(folder))} lfs pull"
        )


def _looks_local(path: str) -> bool:
    """Whether a path can only be a folder; `owner/name` may also be a name on the hub."""
    text = str(path)
    is_written_as_path = text.startswith((".", "~", os.sep)) or text.endswith("/") or "\\" in text
    return is_written_as_path or text.count("/") > 1 or Path(text).exists()


def _causes(error: BaseException) -> list[BaseException]:
    """The error and all its causes; libraries often wrap the one that explains it."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes


def _remedy(path: str, what: str, sentence: str, error: BaseException) -> str:  # noqa: PLR0911  # one return per cause
    """What is wrong, and what to do about it."""
    causes = _causes(error)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are pickled together with a program, which was not run.\n"
            "Use the model's safetensors files, or convert it yourself if you trust it."
        )
    # transformers raises a plain ValueError here; only its text identifies it.
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return (
            f"this {what} comes with its own Python code, which would run on this machine.\n"
            "Read that code (the .py files next to its config.json). If you trust it, pass --trust_remote_code."
        )
    if caused_by(GatedRepoError):
        return (
            "a gated model. Accept its licence on its hub page, then log in: hf auth login\n"
            "(or set HF_TOKEN to a token of an account that has access)."
        )
    if caused_by(RepositoryNotFoundError):
        return "no folder here and no model on the hub has this name. Check the spelling, or hf auth login."
    if caused_by(*_UNREACHABLE) or _TRANSPORT_ERRORS & {type(cause).__name__ for cause in causes}:
        if OFFLINE_BY_CHOICE:
            return (
                "no folder here has this name, the hub's cache has no such model, and HF_HUB_OFFLINE forbids asking "
                "the hub.\nUnset HF_HUB_OFFLINE, or pass the model's folder: --model_path FOLDER."
            )
        endpoint = endpoint_shown()
        return (
            f"no folder here has this name, and the hub at {endpoint} cannot be reached.\n"
            "Set HF_ENDPOINT to a mirror you can reach, or download the model by other means and pass its folder: "
            "--model_path FOLDER."
        )
    if isinstance(error, ImportError):
        return f"loading the {what} needs a package that is not installed: {error}"
    if sentence:
        return f"{sentence}\n{_words(error)}"
    folder = expanded(path)
    names = sorted(file.name for file in folder.iterdir())[:12] if folder.is_dir() else []
    listing = f" Files there: {', '.join(names)}." if names else ""
    return f"no {what} could be loaded.{listing}\n{_words(error)}"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:_SHOWN_CHARACTERS]}"
