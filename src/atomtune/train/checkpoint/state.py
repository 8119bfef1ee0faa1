"""State: optimizer, schedule, gradient scaler and random numbers as JSON and safetensors.

torch.save would write pickles, and reading a pickle runs whatever program lies in it. Here numbers and words are JSON
and tensors are safetensors: reading them runs nothing.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)


def save_state(folder: Path, name: str, value: Any) -> None:
    """Write a nest of dicts, lists, tuples, numbers, words and tensors as name.json and name.safetensors.

    Raises TypeError for anything else, with its place.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain = _plain(value, tensors, name)
    (folder / f"{name}.json").write_text(json.dumps(plain), encoding="utf-8")
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")


def load_state(folder: Path, name: str) -> Any:
    """What save_state wrote, tensors on the CPU. Raises FileNotFoundError when it did not."""
    tensors = folder / f"{name}.safetensors"
    plain = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    # Copied: what load_file gives is the file itself in memory, which a rotation may remove.
    return _nested(plain, {k: t.clone() for k, t in load_file(tensors).items()} if tensors.is_file() else {})


def _plain(value: Any, tensors: dict[str, torch.Tensor], place: str) -> Any:
    """JSON that keeps what JSON has not: tensors, tuples, and keys that are numbers."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {"tensor": place}
    if isinstance(value, numpy.ndarray | numpy.generic):
        return _plain(value.tolist(), tensors, place)
    if isinstance(value, list | tuple):
        items = [_plain(one, tensors, f"{place}.{i}") for i, one in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, dict):
        pairs = [[_plain(k, tensors, place), _plain(v, tensors, f"{place}.{k}")] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, str):  # an enumeration of words, as the schedulers' names are
        return str(value)
    raise TypeError(f"{place} is a {type(value).__name__}, which is neither number, word nor tensor")


def _nested(plain: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_nested(k, tensors): _nested(v, tensors) for k, v in content}
    items = [_nested(one, tensors) for one in content]
    return tuple(items) if kind == "tuple" else items


#: A whole state on the CPU of the first rank, named by the weights' names, so that another number of ranks can read it.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state whose weights are divided among ranks (FSDP), put together; every rank must ask."""
    return get_optimizer_state_dict(model, optimizer, options=_WHOLE)


def scatter(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give every rank its part of what `gathered` put together; every rank must ask, with the same state."""
    set_optimizer_state_dict(model, optimizer, state, options=_WHOLE)


def random_state() -> dict[str, Any]:
    """The state of every source of random numbers of this process."""
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put random_state() back."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
