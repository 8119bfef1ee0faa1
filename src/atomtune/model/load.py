"""Load: tokenizer and base model, from a folder or the hub.

Errors of libraries become BadModel errors with a remedy (load_errors.py).
"""

import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from atomtune.choices import MODEL_CONFIG, Dtype, Quantize
from atomtune.data.encoding.tokenizer_trial import MOST_GROWTH, growth_of
from atomtune.data.tokenizer import Tokenizer
from atomtune.errors import BadModel, BadSettings, listing
from atomtune.extras import refuse_missing_packages
from atomtune.limits import try_in_child_process
from atomtune.model.auto_class import auto_class
from atomtune.model.base_checks import check_base_folder, refuse_not_causal, refuse_other_kind
from atomtune.model.causal_lm import CausalLM
from atomtune.model.file_schemas import ModelConfig, SpecialTokens, TokenizerConfig
from atomtune.model.fingerprint import folder_of, weight_files
from atomtune.model.json_files import JsonFile, checked, refuse_no_files, refuse_unreadable
from atomtune.model.load_errors import explained, refuse_lfs_pointers, rust_silenced
from atomtune.model.scores import names_a_cap
from atomtune.model.weight_sizes import refuse_other_sizes

#: Endings of buffers that older versions saved with the weights: constants that a model computes itself.
OLD_BUFFERS = (".masked_bias", "rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


def quiet_libraries() -> None:
    """Silence the libraries' own messages and progress bars; the commands print what matters."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # downloads of many GB keep their progress bar
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")


def device_in_use() -> torch.device:
    """This process's accelerator, chosen by torchrun's LOCAL_RANK, else the CPU.

    Raises BadSettings if there are too few.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if rank >= devices:
        raise BadSettings([f"There are {devices} GPUs here, but more processes. Pass --nproc_per_node {devices}."])
    return torch.device(accelerator.type, rank)


def good_at_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and _cpu_bfloat16_instructions())
    return device.type in ("xpu", "npu")


def _cpu_bfloat16_instructions() -> bool:
    # Private, but torch has no public check: mkldnn alone also reports bfloat16 that it would emulate.
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        supported = getattr(torch.cpu, name, None)
        if supported is not None and supported():
            return True
    return False


def resolve_dtype(
    name: Dtype, device: torch.device, *, fp16: bool = False, bf16: bool = False, notice: Callable[[str], None]
) -> torch.dtype:
    """The dtype of the base's weights: --dtype, else what --fp16 or --bf16 mean on this device, else its best.

    float16 on a CPU is not faster and has no loss scaler; the device's best is used instead, with a notice.
    """
    if name != "auto":
        return getattr(torch, name)
    best = torch.bfloat16 if good_at_bfloat16(device) else torch.float32
    if fp16 and device.type == "cpu":
        notice(f"--fp16: this CPU cannot train in float16; {dtype_name(best)} is used instead.")
        return best
    if fp16:
        return torch.float16
    if bf16 and best != torch.bfloat16:
        notice("--bf16: this device has no bfloat16 arithmetic; float32 is used instead.")
    return best


def dtype_name(dtype: torch.dtype) -> Dtype:
    """torch.bfloat16 → "bfloat16", as users write it."""
    return cast(Dtype, str(dtype).removeprefix("torch."))


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """The model's tokenizer. If it is only published as `tokenizer.model`, it tokenizes as sentencepiece does.

    Raises BadModel with a remedy if there is none, or if it is broken.
    """
    with explained(path, "tokenizer"):
        folder = folder_of(path)
        files = _checked_tokenizer_files(folder) if folder else []
    # For a name on the hub, standard error stays visible, because it shows the download's progress.
    with explained(path, "tokenizer", files=", ".join(files)), rust_silenced() if files else nullcontext():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if type(tokenizer).__name__ == "MistralCommonBackend":
            # Chosen if mistral-common is installed. It recognises no control token in a text: a rendered [INST] becomes
            # five tokens of text. transformers' own tokenizer, which servers use, makes it one token.
            specials = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
            tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code, mistral_format=False, **specials
            )
        local = Path(path)
        sentencepiece = local / "tokenizer.model"
        converted = (local / "tokenizer.json").exists() or (local / "tokenizer_config.json").exists()
        if sentencepiece.is_file() and not converted:
            _follow_sentencepiece(tokenizer.backend_tokenizer, sentencepiece)
        if (characters := growth_of(tokenizer)) > MOST_GROWTH:
            raise BadModel(
                f"{path}: the rules in its tokenizer.json turn one character into {characters:,}; no published "
                "tokenizer does. Use the tokenizer that was published with the model."
            )
        # Meant for BERT: "a , b" in a model's answer would be shown, compared and scored as "a, b".
        tokenizer.clean_up_tokenization_spaces = False
        # Contradicting special tokens raise when they are read, and a bad regex when it is used on a text.
        _ = tokenizer.all_special_ids, tokenizer("Hi, 1 2\n你好")
    return tokenizer


#: The JSON files that define a tokenizer, and their schemas. tokenizer.json has none: it may have 30 MB, and the
#: library that reads it checks its structure strictly.
_TOKENIZER_FILES: dict[str, type[JsonFile] | None] = {
    "tokenizer.json": None,
    "tokenizer_config.json": TokenizerConfig,
    "special_tokens_map.json": SpecialTokens,
    MODEL_CONFIG: ModelConfig,
}


def _checked_tokenizer_files(folder: Path) -> list[str]:
    """Check the files that are there and return their names; empty if there is no tokenizer."""
    refuse_no_files(folder)
    present = [name for name in _TOKENIZER_FILES if (folder / name).exists()]
    for name in present:
        shape = _TOKENIZER_FILES[name]
        if shape is None:
            refuse_unreadable(folder / name)
            _refuse_what_ends_its_reader(folder / name)
        else:
            checked(folder / name, shape)
    return present if present != [MODEL_CONFIG] else []


#: A non-empty continuing_subword_prefix, which few tokenizers have; or a letter or `_` as an escape, which could spell
#: that key and which no tokenizer library writes.
_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]|\\u00(?:5[fF]|[67])')


def _refuse_what_ends_its_reader(file: Path) -> None:
    """Raise BadModel if the library panics while it cleans up after a panic, which would abort this process.

    The only known case is a BPE with a `continuing_subword_prefix` that its merges lack. Other files are not read
    twice, because a vocabulary of 260,000 takes 0.8 s. The file is read in a process of its own.
    """
    from tokenizers import Tokenizer as Backend

    if not _PREFIX.search(file.read_bytes()):
        return
    tripped = try_in_child_process(lambda _say: Backend.from_file(str(file)))
    if tripped is not None and tripped.cause != "time":
        raise BadModel(
            f"{file}: reading it crashed the process that tried it, so its parts do not match.\nCopy "
            "the folder again, or use the tokenizer that was published with the model."
        )


def _follow_sentencepiece(backend: Any, model_file: Path) -> None:
    """Set how spaces are encoded and decoded, following the SentencePiece file.

    transformers before 5.24 converts a lone tokenizer.model without its `add_dummy_prefix` and
    `remove_extra_whitespaces` (5.23: "你好" becomes 你|好, sentencepiece gives ▁你好), so the base would read ids that
    it never saw. Normalizer and decoder are replaced, not extended, because 5.24 does it right and would get it twice.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, decoders, normalizers

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model_file.read_bytes())
    rules = proto.normalizer_spec
    written: list[Any] = []  # steps from a text to tokens
    if rules.precompiled_charsmap:
        written.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        written += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    read: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]  # and back
    if rules.add_dummy_prefix:
        written.append(normalizers.Prepend("▁"))
        read.append(decoders.Strip(" ", 1, 0))
    written.append(normalizers.Replace(" ", "▁"))
    backend.normalizer = normalizers.Sequence(written)
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(read)


def pad_id_of(tokenizer: Tokenizer) -> int:
    """The id for padding: PAD, else UNK, else EOS, else 0. Padding is masked by position, so any id would do."""
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


def load_base(spec: BaseSpec) -> CausalLM:
    """The frozen base model on its device, with the KV cache off.

    Raises BadModel with a remedy if it is missing, gated, unreachable, needs remote code, or if its files do not match.
    """
    placement: dict[str, Any] = {"device_map": spec.device_map} if spec.device_map else {}
    if spec.quantize:
        placement = {
            "quantization_config": _quantization(spec.quantize, spec.dtype),
            "device_map": spec.device_map or {"": spec.device},
        }
    config = read_config(spec.path, trust_remote_code=spec.trust_remote_code)
    if folder := folder_of(spec.path):
        # Before anything is read, refuse an index that names files outside the folder, and git-lfs pointers.
        files = weight_files(folder)
        refuse_lfs_pointers(files)
        with explained(spec.path, "model"):
            refuse_other_sizes(spec.path, config, files, trust_remote_code=spec.trust_remote_code)
    with explained(spec.path, "model"):
        base, report = auto_class(config).from_pretrained(
            spec.path,
            config=config,
            dtype=spec.dtype,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # mismatches are in the report, and refused by name below
            **placement,
        )
    _refuse_partial(spec.path, report)
    if not placement:
        base.to(spec.device)
    _keep_four_bits_as_they_are(base)
    keep_soft_caps(base)
    base.config.use_cache = False
    base.requires_grad_(False)
    refuse_not_causal(spec.path, base)
    return base


def _keep_four_bits_as_they_are(base: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit layers for inference.

    A CPU with AVX-512 bfloat16 repacks a layer at its first call in eval mode, permanently. From then on its product is
    rounded to bfloat16 and passes no gradient on, so all layers below silently lose nearly all of theirs.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def keep_soft_caps(base: Any) -> None:
    """Give a model whose attention scores have a soft cap an attention function that applies it (eager)."""
    if names_a_cap(base.config):
        base.set_attn_implementation("eager")


def load_dequantized(spec: BaseSpec, *, trained_in: Dtype = "auto") -> CausalLM:
    """The base with plain weights, as training with spec.quantize used them: quantized and dequantized.

    trained_in  the dtype from which training quantized them; from another dtype, some weights round to another step
    Bases whose files are quantized are dequantized too. Raises BadModel if that is not possible.
    """
    if spec.quantize and trained_in not in ("auto", dtype_name(spec.dtype)):
        trained = load_dequantized(replace(spec, dtype=getattr(torch, trained_in)))
        stored = load_base(replace(spec, quantize=None))
        stored.load_state_dict(trained.state_dict())  # rounds to the dtype of each weight
        return stored
    base = load_base(spec)
    if not getattr(base, "is_quantized", False):
        return base
    try:
        plain: CausalLM = base.dequantize(dtype=spec.dtype)  # type: ignore[operator]  # nn.Module's attributes are tensors
    except NotImplementedError:  # a quantization that transformers cannot undo
        method = getattr(base.config.quantization_config, "quant_method", "quantized")
        method = getattr(method, "value", method)  # an enum's, whose own text is QuantizationMethod.TORCHAO
        raise BadModel(
            f"{spec.path}: its weights are stored as {method}, which cannot be dequantized to merge into them. Pass "
            "--model_path with the base that is not quantized, and --other_base."
        ) from None
    # Until 5.23, transformers keeps how the quantized files were read, and could not save the plain weights.
    vars(plain).pop("_weight_conversions", None)
    plain.requires_grad_(False)
    return plain


def read_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """transformers' config of a base. Raises BadModel if the path is no base, or if its small files are broken."""
    with explained(path, "model"):
        if folder := folder_of(path):
            check_base_folder(folder)
    with explained(path, "model", files=MODEL_CONFIG):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        refuse_other_kind(path, config)
    return config


def _refuse_partial(path: str, report: Mapping[str, Any]) -> None:
    """Raise BadModel if the weight files and the model do not have the same tensors.

    transformers fills missing tensors with random numbers and drops those that the model has no place for. Its report
    leaves out tied weights, and those that the model's class declares as ignorable.
    """
    missing = sorted(report["missing_keys"])
    unused = sorted(name for name in report["unexpected_keys"] if not name.endswith(OLD_BUFFERS))
    mismatched = sorted(report["mismatched_keys"])
    problems = [f"  {name}: not in the weight files; it would be initialised at random" for name in missing]
    problems += [
        f"  {name}: {tuple(stored)} in the weight files, {tuple(expected)} in the model"
        for name, stored, expected in mismatched
    ]
    problems += [f"  {name}: in the weight files, but the model has no place for it" for name in unused]
    if problems:
        raise BadModel(
            f"{path}: the weight files do not fit the model that its config.json describes.\n{listing(problems)}\n"
            "Use the files that were published together, or correct the names."
        )


def stored_dtype(path: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype in which a model's weights are stored; float32 if its config does not say."""
    config = read_config(path, trust_remote_code=trust_remote_code)
    # Vision-language configs have it at the top, in the text part, or in both.
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def is_stored_quantized(path: str, *, trust_remote_code: bool = False) -> bool:
    """Whether a model's files hold quantized weights, according to its config."""
    return getattr(read_config(path, trust_remote_code=trust_remote_code), "quantization_config", None) is not None


def embedding_rows(path: str, *, trust_remote_code: bool = False) -> int | None:
    """How many token ids a model has, according to its config; None if that does not say."""
    config = read_config(path, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "vocab_size", None)


def _quantization(quantize: Quantize, dtype: torch.dtype) -> Any:
    refuse_missing_packages(["bitsandbytes"], extra="qlora", what=f"--quantize {quantize}")
    if quantize == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
