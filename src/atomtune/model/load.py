"""Load: tokenizer and base model, from a folder or the hub, with errors that say what to do.

Before: the settings' plain values.  After: adapter.py wraps the base.
"""

import logging
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from atomtune.choices import Dtype, Quantize
from atomtune.errors import BadModel, BadSettings, UserError
from atomtune.model.fingerprint import folder_of, weight_files


def quiet_libraries() -> None:
    """Silence what the libraries print; the rooms say it in their own words."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # a download of many GB keeps its bar
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")


def device_in_use() -> torch.device:
    """The accelerator of this process, else the CPU; torchrun's LOCAL_RANK chooses among several GPUs."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def good_at_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware (emulation is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and _cpu_bfloat16_instructions())
    return device.type in ("xpu", "npu")


def _cpu_bfloat16_instructions() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe)() for probe in probes if hasattr(torch.cpu, probe))


def resolve_dtype(
    name: Dtype, device: torch.device, *, fp16: bool, bf16: bool, notice: Callable[[str], None]
) -> torch.dtype:
    """The dtype of the base's weights: as asked, else what --fp16/--bf16 mean here, else the device's best.

    fp16 on a CPU has neither speed nor a loss scaler, so the nearest the device can is taken and said.
    """
    if name != "auto":
        return getattr(torch, name)
    best = torch.bfloat16 if good_at_bfloat16(device) else torch.float32
    if fp16 and device.type == "cpu":
        notice(f"--fp16: this CPU cannot train in float16; taking {str(best).removeprefix('torch.')} instead.")
        return best
    if fp16:
        return torch.float16
    if bf16 and best != torch.bfloat16:
        notice("--bf16: this device has no bfloat16 arithmetic; taking float32 instead.")
    return best


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer; one that is published as `tokenizer.model` alone is read as sentencepiece reads it.

    Raises BadModel with the remedy when there is none.
    """
    with _explained(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    lone = Path(path) / "tokenizer.model"
    if lone.is_file() and not any((lone.parent / f"tokenizer{end}.json").exists() for end in ("", "_config")):
        _follow_sentencepiece(tokenizer, lone)
    return tokenizer


def _follow_sentencepiece(tokenizer: Any, model_file: Path) -> None:
    """Set how spaces are written and read back as the SentencePiece file says.

    transformers before 5.24 converts a lone tokenizer.model without its `add_dummy_prefix` and
    `remove_extra_whitespaces` (5.23: "你好" becomes 你|好 where sentencepiece gives ▁你好), so a base would meet ids it
    never saw. The whole way is set, not amended: amending 5.24, which does it right, would do it twice.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, decoders, normalizers

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model_file.read_bytes())
    rules = proto.normalizer_spec
    backend = tokenizer.backend_tokenizer
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
        back.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(back)


def pad_id_of(tokenizer: Any) -> int:
    """The id to fill up with: PAD, else UNK, else EOS. Padding is masked by position, so any id would do."""
    for token_id in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


@dataclass(frozen=True, kw_only=True)
class BaseSpec:
    """Which base model, and how its weights are held."""

    path: str  # a folder or a hub name
    dtype: torch.dtype
    device: torch.device
    device_map: str | None = None
    quantize: Quantize | None = None
    trust_remote_code: bool = False


def load_base(spec: BaseSpec) -> Any:
    """The frozen base model on its device, KV cache off.

    Raises BadModel with the remedy: not there, gated, no network, needs remote code, does not fit.
    """
    placement: dict[str, Any] = {"device_map": spec.device_map} if spec.device_map else {}
    if spec.quantize:
        placement = {
            "quantization_config": _quantization(spec.quantize, spec.dtype),
            "device_map": spec.device_map or {"": spec.device},
        }
    if folder := folder_of(spec.path):
        weight_files(folder)  # an index that leads out of the folder is refused before anything is read
    with _explained(spec.path, "model"):
        config = AutoConfig.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
        base = AutoModelForCausalLM.from_pretrained(
            spec.path, config=config, dtype=spec.dtype, trust_remote_code=spec.trust_remote_code, **placement
        )
    if not placement:
        base.to(spec.device)
    base.config.use_cache = False
    base.requires_grad_(False)
    return base


def stored_dtype(path: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype a model's weights are stored in; float32 where its config does not say."""
    with _explained(path, "model"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _quantization(quantize: Quantize, dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise BadSettings(
            [f"--quantize {quantize} needs bitsandbytes, which is not installed.\n  pip install 'atomtune[qlora]'"]
        ) from None
    if quantize == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


_LOADERS_RAISE = (OSError, ValueError, ImportError, EOFError, pickle.UnpicklingError, SafetensorError)


class _explained:
    """Turn what a loader raises into a BadModel that says what to do."""

    def __init__(self, path: str, what: str) -> None:
        self.path, self.what = path, what

    def __enter__(self) -> None:
        if _looks_local(self.path) and not Path(self.path).expanduser().is_dir():
            raise BadModel(f"{self.path}: no such folder. Pass --model_path with a model's folder or its hub name.")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, UserError) or not isinstance(error, _LOADERS_RAISE):
            return
        if isinstance(error, pickle.UnpicklingError):
            raise BadModel(
                f"{self.path}: its weights are pickled together with a program, which was not run. Take the model's "
                "safetensors files, or convert it where you trust it."
            ) from error
        raise BadModel(_remedy(self.path, self.what, error)) from error


def _looks_local(path: str) -> bool:
    return Path(path).exists() or path.startswith((".", "~", os.sep)) or path.count("/") > 1 or "\\" in path


def _remedy(path: str, what: str, error: BaseException) -> str:
    """Name the cause of a failed load and what to do about it."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    names = {type(cause).__name__ for cause in causes}
    said = str(error)
    if "trust_remote_code" in said:
        return (
            f"{path}: this {what} comes with its own Python code, which would run on this machine.\n"
            "Read that code (the .py files beside its config.json), and if you trust it, pass --trust_remote_code."
        )
    if "GatedRepoError" in names or "gated" in said:
        return (
            f"{path}: a gated model. Accept its licence on its hub page, then log in: hf auth login\n"
            "(or set HF_TOKEN to a token of an account that has access)."
        )
    if "RepositoryNotFoundError" in names:
        return f"{path}: no folder here and no model on the hub has this name. Check the spelling, or hf auth login."
    if names & {"LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ConnectionError", "OfflineModeIsEnabled"}:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rpartition("@")[2]  # no user:token@
        return (
            f"{path}: no folder here has this name, and the hub at {endpoint} cannot be reached.\n"
            "Set HF_ENDPOINT to a mirror you can reach, or download the model by other means and pass its folder."
        )
    if isinstance(error, ImportError):
        return f"{path}: loading the {what} needs a package that is not installed: {said}"
    here = f" Files there: {', '.join(sorted(os.listdir(path))[:12])}." if Path(path).is_dir() else ""  # noqa: PTH208
    return f"{path}: no {what} could be loaded.{here}\n{type(error).__name__}: {said[:600]}"
