"""Base checks: whether a path given as a base is a folder with a causal language model that works.

Other things that users often pass by mistake (an adapter, a checkpoint, a GGUF file) each get their own message.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import ModelOutput

from atomtune.choices import ADAPTER_CONFIG, GENERATION_CONFIG, MODEL_CONFIG
from atomtune.errors import BadModel
from atomtune.model.auto_class import classes_for, is_known
from atomtune.model.causal_lm import CausalLM
from atomtune.model.file_schemas import AdapterConfig, GenerationConfig, ModelConfig
from atomtune.model.json_files import checked, refuse_no_files
from atomtune.model.load_errors import explained, refuse_lfs_pointers
from atomtune.model.modes import as_in_training, without_dropout

#: How many file names a message shows.
_SHOWN_NAMES = 12
_STATE = "trainer_state.json"
#: Length of the test text, and how many of its first tokens must not depend on the rest.
_TOKENS, _LOOKED_AT = 6, 3


def check_base_folder(folder: Path) -> None:
    """Raise BadModel if a folder holds no model, or if its small config files have invalid values."""
    refuse_no_files(folder)
    if not (folder / MODEL_CONFIG).is_file():
        _refuse_another_kind_of_folder(folder)
        names = ", ".join(sorted(file.name for file in folder.iterdir())[:_SHOWN_NAMES]) or "none"
        raise BadModel(f"{folder} has no {MODEL_CONFIG}, so it is not a model folder. Files there: {names}.")
    checked(folder / MODEL_CONFIG, ModelConfig)
    if (folder / GENERATION_CONFIG).exists():
        checked(folder / GENERATION_CONFIG, GenerationConfig)


def _refuse_another_kind_of_folder(folder: Path) -> None:
    if (folder / ADAPTER_CONFIG).is_file():
        base = checked(folder / ADAPTER_CONFIG, AdapterConfig).base_model_name_or_path
        is_checkpoint = (folder / _STATE).is_file()
        kind = "a checkpoint of a run" if is_checkpoint else "an adapter"
        use = f"--resume_from_checkpoint {folder}" if is_checkpoint else f"--continue_training --checkpoint {folder}"
        raise BadModel(
            f"{folder} is {kind}, not a base model. It was trained on {base or 'a base that it does not name'}.\n"
            f"Pass --model_path with that base. To continue training from these weights: {use}. To use the adapter as "
            "a base, merge it first (atomtune merge)."
        )
    if ggufs := sorted(folder.glob("*.gguf")):
        raise BadModel(
            f"{folder} holds {ggufs[0].name}, a GGUF file for llama.cpp, which cannot be trained.\n"
            "Pass the folder or hub name of the model that it was made from."
        )
    refuse_lfs_pointers([file for file in folder.glob("*.safetensors") if file.is_file()])


def refuse_other_kind(path: str, config: Any) -> None:
    """Raise BadModel if a config is not that of a causal language model that transformers has a class for."""
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder, which reads its whole input before it writes"
    elif not is_known(config):
        what = "of another kind"
    else:
        _refuse_without_forward(path, config)
        return
    raise BadModel(
        f"{path}: {config.model_type} is {what}. atomtune trains causal language models (Llama, Qwen, Gemma, …).\n"
        "Pass --model_path with one of those."
    )


def _refuse_without_forward(path: str, config: Any) -> None:
    """Raise BadModel for a class that can generate but has no forward, as that of the whole Qwen3-Omni."""
    classes = classes_for(config)
    if not classes or any(kind.forward is not nn.Module.forward for kind in classes):
        return
    parts = [kind.__name__ for name in config.sub_configs for kind in classes_for(getattr(config, name, None))]
    whole = classes[0].__name__
    text = f"{path}: {whole} has no forward, so it cannot be trained as a whole."
    if parts:
        text += f"\nIts part {parts[0]} can: save that as a checkpoint of its own, with the tokenizer."
    raise BadModel(text)


def reading_text(path: str, model: CausalLM) -> explained:
    """Within this context, an error that a model raises on a text becomes a BadModel that says so."""
    return explained(
        path,
        "model",
        sentence=f"its class {type(model).__name__} cannot compute a text alone. If it needs an image, a sound "
        "or another model with each text, it cannot be trained here; if not, its config.json and weights do not match. "
        "Its error:",
    )


def refuse_not_causal(path: str, model: CausalLM) -> None:
    """Raise BadModel if later tokens change the predictions for earlier ones, or if the model cannot compute.

    The test is a gradient: in a causal model, the gradient of an earlier token's logits by a later token's embedding is
    exactly zero, in every dtype. Comparing the logits of two texts would miss small effects below 16-bit rounding.
    """
    reading = reading_text(path, model)
    with reading:
        embeddings = model.get_input_embeddings()
        rows = embeddings.weight.shape[0]
    if rows < _TOKENS:  # the matrix is sharded over processes (DeepSpeed)
        return
    device = embeddings.weight.device
    # The first and last ids are avoided: their embeddings are often zero (padding). The norm of a zero vector
    # multiplies gradients by a thousand in each layer, until they are NaN.
    ids = (2 * torch.arange(_TOKENS, device=device) + 1)[None] * rows // (2 * _TOKENS)  # [1, T]
    of_tokens: list[torch.Tensor] = []  # [1, T, D], or [T, 1, D]

    def watch(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        of_tokens.append(output.detach().requires_grad_())
        return of_tokens[-1].clone()  # a clone, because some models scale it in place, which torch forbids for a leaf

    watching = embeddings.register_forward_hook(watch)
    with watching, reading, _faults_of_the_library(path, model), without_dropout(model), as_in_training(model):
        logits = model(input_ids=ids, use_cache=False).logits.float()  # [1, T, V]
    gradient = _gradient(logits[:, :_LOOKED_AT].square().mean(), of_tokens)
    if not bool(torch.isfinite(logits).all()):
        raise BadModel(f"{path}: what this model computes is not finite (NaN or infinity). Are its files complete?")
    if gradient is None or _TOKENS not in gradient.shape or not bool(torch.isfinite(gradient).all()):
        return  # the trial of layouts decides, by comparing two texts
    by_token = gradient.movedim(gradient.shape.index(_TOKENS), 0)  # XLNet's gradient is [T, 1, D]
    if bool(by_token[_LOOKED_AT:].any()):
        raise BadModel(
            f"{path} is not a causal model: later tokens change its predictions for earlier ones, as in BERT, or in a "
            "prompt of PaliGemma.\n"
            "It would learn to copy the answer that it sees. Pass --model_path with a causal language model."
        )


@contextlib.contextmanager
def _faults_of_the_library(path: str, model: CausalLM) -> Iterator[None]:
    """Raise BadModel if the model's class reads an attribute that the output of one of its parts does not have.

    That is a bug of transformers, not of the files: Llama 4's whole class reads image features from its text part
    (transformers 5.24).
    """
    try:
        yield
    except AttributeError as error:
        if not isinstance(error.obj, ModelOutput):
            raise
        name, version = type(model).__name__, transformers.__version__
        raise BadModel(
            f"{path}: {name} fails on a text in the code of transformers {version}: {error}.\n"
            "Try another version of transformers, or another model."
        ) from error


def _gradient(value: torch.Tensor, of_tokens: list[torch.Tensor]) -> torch.Tensor | None:
    """The gradient by the embeddings of the tokens; None if none flows back to them, which training reports."""
    if not of_tokens or not value.requires_grad:
        return None
    try:
        return torch.autograd.grad(value, of_tokens[0], allow_unused=True)[0]
    except (RuntimeError, NotImplementedError):
        return None
