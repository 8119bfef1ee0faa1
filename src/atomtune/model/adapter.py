"""The adapter's life: made, counted, filled from older files, saved with its card, loaded again.

Before: load.py gives the base.  After: train.trainer, use.
Stands on PEFT; LoRA: Hu et al. 2021, arXiv 2106.09685.
"""

import contextlib
import json
import pickle
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from atomtune.errors import BadModel, BadSettings, RunFailed, listing

CARD = "atomtune.json"
WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a server must know beyond PEFT's config: how a prompt is written and where an answer stops."""

    template: str
    instruction_role: Literal["system", "user"]
    stop: str
    instruction: str | None = None  # the one nearly all records shared: chat's default
    data_hash: str = ""
    base: str = ""  # the fingerprint of the weights it was trained on
    max_seq_length: int = 256

    def save(self, folder: Path) -> None:
        (folder / CARD).write_text(json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Card | None":
        file = folder / CARD
        if not file.is_file():
            return None
        known = {field.name for field in fields(cls)}
        with _readable(file):
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{name: value for name, value in values.items() if name in known})


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Raise BadModel where a small file beside the weights does not say what it should."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadModel(
            f"{file} is not readable: {type(error).__name__}: {str(error)[:200]}\n"
            "It may be torn: copy the folder again, or take another checkpoint."
        ) from error


def linear_names(base: Any) -> list[str]:
    """Full names of the layers LoRA can adapt, the output layer left out."""
    head = base.get_output_embeddings()
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name.rpartition(".")[2] != "lm_head"
    ]


def match_targets(base: Any, targets: Sequence[str]) -> dict[str, int]:
    """How many modules each target name matches (all linear layers for all-linear).

    Raises BadSettings when a named target matches none, with the names that exist.
    """
    names = linear_names(base)
    kinds = Counter(name.rpartition(".")[2] for name in names)
    if list(targets) == [ALL_LINEAR]:
        if not kinds:
            raise BadModel("The base has no linear layer that LoRA could adapt.")
        return dict(sorted(kinds.items()))
    counts = {target: len(_matched(base, [target])) for target in targets}
    missing = [t for t, count in counts.items() if not count]
    if missing:
        there = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
        raise BadSettings(
            [f"--lora_targets: no module is called {', '.join(missing)}. Linear layers of this model: {there}."]
        )
    return counts


def new_adapter(base: Any, *, rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> PeftModel:
    """Wrap the base in a fresh LoRA adapter: B is zero, so the model still answers as the base."""
    chosen: str | list[str] = ALL_LINEAR if list(targets) == [ALL_LINEAR] else list(targets)
    fan_in_fan_out = any(isinstance(module, Conv1D) for module in base.modules())
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=chosen,
        fan_in_fan_out=fan_in_fan_out,
    )
    try:
        return get_peft_model(base, config)
    except ValueError as error:  # e.g. a norm or a whole attention was named
        raise BadSettings([f"--lora_targets: {error}"]) from error


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts as the parameters it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
        count = torch.Size(shape).numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def adapter_file(path: Path) -> Path | None:
    """The weights a path means: the file itself, or the one in the folder."""
    if path.is_file():
        return path
    return next((path / name for name in (WEIGHTS, OLD_WEIGHTS) if (path / name).is_file()), None)


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Adapter tensors under PEFT's names; the tutorial's `.default.` keys lose that part. No pickled code runs."""
    try:
        if file.suffix == ".safetensors":
            tensors: Mapping[str, Any] = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BadModel(f"{file}: not readable as adapter weights: {type(error).__name__}: {error}") from error
    return {name.replace(".default.", "."): tensor for name, tensor in tensors.items()}


def start_from_weights(
    base: Any,
    file: Path,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    notice: Callable[[str], None],
) -> PeftModel:
    """A trainable adapter filled from a file of weights alone.

    Beside an adapter_config.json that config holds, and what was asked otherwise is said. Without one (the tutorial's
    checkpoints) rank and targets are read from the tensors; alpha and dropout are the run's settings.
    """
    weights = read_weights(file)
    if (file.parent / "adapter_config.json").is_file():
        config = _config_in(file.parent)
        if not isinstance(config, LoraConfig):
            raise BadModel(f"{file.parent}: its adapter is not LoRA, so it cannot be trained on here.")
        config.inference_mode = False
        _say_unused(config, base, rank=rank, alpha=alpha, dropout=dropout, targets=targets, notice=notice)
        model = get_peft_model(base, config)
    else:
        ranks = {tensor.shape[0] for name, tensor in weights.items() if "lora_A" in name}
        if len(ranks) != 1:
            raise BadModel(f"{file}: holds no LoRA tensors of one rank (found ranks: {sorted(ranks) or 'none'}).")
        found = ranks.pop()
        if found != rank:
            notice(f"{file.name} holds an adapter of rank {found}; taking {found} instead of --lora_rank {rank}.")
        modules = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in weights}
        model = new_adapter(base, rank=found, alpha=alpha, dropout=dropout, targets=_shortest(base, modules))
    _fill(model, weights, file)
    return model


def _config_in(folder: Path) -> PeftConfig:
    with _readable(folder / "adapter_config.json"):
        config = PeftConfig.from_pretrained(str(folder))
        if type(config) is PeftConfig:
            raise KeyError("peft_type")
    return config


def _say_unused(
    config: LoraConfig, base: Any, *, targets: Sequence[str], notice: Callable[[str], None], **asked: float
) -> None:
    has = {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
    for name, value in asked.items():
        if value != has[name]:
            notice(f"--lora_{name} {value:g} is not used: the checkpoint's adapter has {has[name]:g}.")
    own = config.target_modules
    if not isinstance(own, set | list):  # a pattern
        return
    adapted = _matched(base, own)
    if adapted != _matched(base, linear_names(base) if list(targets) == [ALL_LINEAR] else targets):
        names = ",".join(_shortest(base, adapted))
        notice(f"--lora_targets {','.join(targets)} is not used: the checkpoint's adapter has {names}.")


def _matched(base: nn.Module, targets: Collection[str]) -> set[str]:
    """The full names of the modules that target names mean."""
    return {name for name, _ in base.named_modules() if any(name == t or name.endswith(f".{t}") for t in targets)}


def _shortest(base: nn.Module, modules: set[str]) -> list[str]:
    """Last name parts, if these match just the given modules; else the full names."""
    parts = sorted({name.rpartition(".")[2] for name in modules})
    matched = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in parts}
    return parts if matched == modules else sorted(modules)


def _fill(model: PeftModel, weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Load every tensor, or name each that does not fit with both shapes."""
    own = get_peft_model_state_dict(model)
    problems = [f"{name}: not in the file" for name in own.keys() - weights.keys()]
    problems += [f"{name}: not in this model" for name in weights.keys() - own.keys()]
    problems += [
        f"{name}: {tuple(tensor.shape)} in the file, {tuple(own[name].shape)} in this model"
        for name, tensor in weights.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        raise BadModel(f"{file} does not fit this base and these LoRA settings:\n{listing(sorted(problems))}")
    set_peft_model_state_dict(model, dict(weights))


def load_trained(base: Any, folder: Path) -> PeftModel:
    """A saved adapter on its base, ready to answer."""
    if adapter_file(folder) is None or not (folder / "adapter_config.json").is_file():
        raise BadModel(
            f"{folder}: no adapter here (adapter_config.json and {WEIGHTS}).\n"
            "Pass --adapter_path with a run's output folder or one of its checkpoint-N folders."
        )
    try:
        return PeftModel.from_pretrained(base, str(folder), config=_config_in(folder)).eval()
    except (pickle.UnpicklingError, SafetensorError, EOFError) as error:
        raise BadModel(
            f"{folder}: its weights cannot be read as tensors: {str(error).splitlines()[0][:300]}\n"
            "A file that holds a program (a pickle) is not run; a torn one can be copied again."
        ) from error
    except RuntimeError as error:
        raise BadModel(f"{folder} does not fit this base: {str(error)[:1500]}") from error


def base_path_of(folder: Path) -> str:
    """The base an adapter was trained on, as its config says."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise BadModel(f"{folder}: no adapter_config.json here. Pass --adapter_path with a run's output folder.")
    with _readable(file):
        return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])


def refuse_unlike(folder: Path, model: PeftModel) -> None:
    """Raise RunFailed when the adapter in a folder is not, bit by bit, the one in memory."""
    written, own = read_weights(folder / WEIGHTS), get_peft_model_state_dict(model)
    unlike = [name for name, tensor in own.items() if name not in written or not _same_bits(written[name], tensor)]
    if unlike or len(written) != len(own):
        raise RunFailed(
            f"{folder / WEIGHTS} does not hold what was to be written (first: {[*unlike, *written][0]}).\n"
            "The disk may be failing; --resume goes on from the last whole checkpoint."
        )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    other = other.detach().cpu()
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )


def refuse_not_finite(model: nn.Module) -> None:
    """Raise RunFailed when a weight that is trained is not finite: a step too large spoils it before any loss tells."""
    if not all(bool(torch.isfinite(weight).all()) for weight in model.parameters() if weight.requires_grad):
        raise RunFailed("The adapter holds values that are not finite; it is not saved. Lower --learning_rate.")


def refuse_empty(model: PeftModel) -> None:
    """Raise RunFailed when a trained adapter would change nothing."""
    tensors = get_peft_model_state_dict(model)
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name):
        raise RunFailed(
            "The adapter is empty: after training every B matrix is still zero, so it would change nothing.\n"
            "Check that --max_steps is at least 1, --learning_rate is above 0 and the loss moved."
        )
