"""Adapter folder: what a saved adapter or merged model says about itself, read without loading the base."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, field, fields
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import PeftConfig
from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file

from atomtune.choices import ADAPTER_CONFIG, BASE, MODEL_CONFIG, RUN_RECORD, Dtype, Quantize
from atomtune.console import as_command
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.choose_template import load_template, restore_template
from atomtune.disk import write_text
from atomtune.engines.served_folder import has_tokenizer
from atomtune.errors import BadModel
from atomtune.model.file_schemas import AdapterConfig, LoraConfigFile
from atomtune.model.json_files import checked, json_object, refusal
from atomtune.model.load import load_tokenizer
from atomtune.model.load_errors import explained

METADATA = "atomtune.json"
WEIGHTS = "adapter_model.safetensors"
#: The weights file of the self-llm tutorial, and of PEFT before 0.5.
OLD_WEIGHTS = "adapter_model.bin"
#: Keys of an adapter's config: ranks and alphas of single layers that differ from the rest. PEFT ignores unknown names.
PATTERNS = ("rank_pattern", "alpha_pattern")
#: Kinds of LoRA, by their key in the config, that would be computed wrongly in a row of many records or beside the bare
#: base.
_NOT_COMPUTED = {
    # PEFT searches each row's ids for the tokens after which it adapts, and only in its own forward.
    "alora_invocation_tokens": "it is an activated LoRA (aLoRA), which adapts only what follows certain tokens",
    "arrow_config": "it is an Arrow router, which chooses among other adapters",
    "layer_replication": "it repeats layers of its base, so beside it the base would not be itself",
}
#: Written after an engine served exactly these weights; it is copied together with them.
CERTIFICATE = "certificate.json"


def _day_or_nothing(text: str) -> str:
    if text:
        date.fromisoformat(text)
    return text


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True))
class AdapterMetadata:
    """What generation needs beyond PEFT's config: the prompt template, the stop token, the base and its dtype."""

    template: str
    instruction_role: Literal["system", "user"]
    stop: str
    template_variables: dict[str, Any] = field(default_factory=dict)  # that training passed to the template
    template_date: Annotated[str, AfterValidator(_day_or_nothing)] = ""  # date in the prompts of training; "" if none
    instruction: str | None = None  # the system text of nearly all training records, chat's default
    data_hash: str = ""
    base: str = ""  # fingerprint of the weights it was trained on
    quantize: Quantize | None = None  # quantization of the base in training
    dtype: Dtype = "auto"  # dtype of the base before quantization; "auto" in files of older versions
    max_seq_length: Annotated[int, Field(ge=1)] | None = None  # None: another tool trained it

    def save(self, folder: Path) -> None:
        write_text(folder / METADATA, json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "AdapterMetadata | None":
        """The metadata beside an adapter; None if another tool wrote it. Keys of later versions are ignored."""
        file = folder / METADATA
        if not file.exists():
            return None
        known = {entry.name for entry in fields(cls)}
        values = json_object(file)
        try:
            return cls(**{name: value for name, value in values.items() if name in known})
        except ValidationError as error:
            raise BadModel(refusal(file, values, error)) from None


def template_of(
    folder: Path,
    *,
    trust_remote_code: bool,
    model_path: str | None = None,
    notice: Callable[[str], None] | None = None,
) -> tuple[Template, AdapterMetadata]:
    """The template with which a saved adapter or merged model was trained, and its metadata.

    A folder written by another tool has no metadata. Then its tokenizer's own chat template is used, or the template
    `atom` if the tokenizer has none. PEFT saves adapters without a tokenizer; then the base's tokenizer is used.
    Whether code that comes with a model may run is decided by the user in each command, never by a downloaded folder.

    model_path  --model_path, used instead of the base that the adapter names
    notice      told that the base's tokenizer is used; None if it has been told before
    Raises BadModel if an adapter of ours has lost its tokenizer, because the base's could write other prompts.
    """
    refuse_empty_folder(folder)
    metadata = AdapterMetadata.load(folder)
    if (folder / ADAPTER_CONFIG).is_file() and not has_tokenizer(folder):
        if metadata is not None:
            raise BadModel(
                f"{folder}: its tokenizer files are missing. atomtune saves the tokenizer and the chat template of the "
                "training with each adapter; with those of the base, prompts could be different.\nCopy the folder "
                "again from where it was trained, with all its files."
            )
        return _template_of_base(folder, model_path, trust_remote_code=trust_remote_code, notice=notice)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    if metadata is not None:
        template = restore_template(
            metadata.template,
            metadata.instruction_role,
            tokenizer,
            variables=metadata.template_variables,
            day=date.fromisoformat(metadata.template_date) if metadata.template_date else None,
        )
        return template, metadata
    return _of_another_tool(load_template("auto", tokenizer))


def templates_of(
    folders: Iterable[Path], *, trust_remote_code: bool, model_path: str | None, notice: Callable[[str], None]
) -> list[tuple[Template, AdapterMetadata]]:
    """`template_of` each folder."""
    return [
        template_of(folder, trust_remote_code=trust_remote_code, model_path=model_path, notice=notice)
        for folder in folders
    ]


def _template_of_base(
    folder: Path, model_path: str | None, *, trust_remote_code: bool, notice: Callable[[str], None] | None
) -> tuple[Template, AdapterMetadata]:
    """The template of the base, for an adapter that another tool (PEFT, TRL) saved without a tokenizer."""
    base = base_of(folder, model_path)
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    template = load_template("auto", tokenizer)
    if notice is not None and tokenizer.chat_template:
        notice(f"{folder} holds no tokenizer, so the tokenizer and the chat template of its base {base} are used.")
    elif notice is not None:
        notice(
            f"{folder} holds no tokenizer, so that of its base {base} is used. It has no chat template: prompts are "
            f"written with the built-in template {template.name}."
        )
    return _of_another_tool(template)


def _of_another_tool(template: Template) -> tuple[Template, AdapterMetadata]:
    """A template with the metadata that can be derived from it."""
    return template, AdapterMetadata(
        template=template.name, instruction_role=template.instruction_role, stop=template.stop
    )


def refuse_empty_folder(folder: Path) -> None:
    """Raise BadModel if a folder holds neither an adapter nor a model; the message names its last checkpoint."""
    if folder.is_file():
        raise BadModel(f"{folder} is a file. Pass its folder: --adapter_path {folder.parent}")
    if not folder.is_dir():
        raise BadModel(f"{folder}: no such folder. Pass --adapter_path with a run's output folder.")
    if (folder / ADAPTER_CONFIG).is_file() or (folder / MODEL_CONFIG).is_file():
        return
    checkpoints = [file.parent for file in folder.glob(f"checkpoint-*/{ADAPTER_CONFIG}")]
    if checkpoints:
        last = max(checkpoints, key=lambda checkpoint: (len(checkpoint.name), checkpoint.name))
        command = as_command(["train", "--resume", "--output_dir", str(folder)])
        raise BadModel(
            f"{folder}: the run here is not finished. Pass --adapter_path {last}, its last checkpoint, or finish it: "
            f"{command}"
        )
    if (folder / RUN_RECORD).is_file():
        raise BadModel(f"{folder}: the run here saved no checkpoint, so there is no adapter.")
    raise BadModel(f"{folder}: no {ADAPTER_CONFIG} here. Pass --adapter_path with a run's output folder.")


def refuse_whole_model(folder: Path) -> None:
    """Raise BadModel where a folder holds no adapter: a merged model, most likely, whose commands are named then."""
    refuse_empty_folder(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        chat = as_command(["chat", "--adapter_path", str(folder)])
        serve = as_command(["serve", "--adapter_path", "RUN", "--served", str(folder)])
        raise BadModel(
            f"{folder} is a whole model, not an adapter: `atomtune merge` writes such folders. Pass --adapter_path "
            f"with a run's output folder.\nTo talk to this model: {chat}\nTo serve it: {serve}"
        )


def base_of(folder: Path, model_path: str | None) -> str:
    """The base's path: --model_path, else that of the adapter's config. Raises BadModel if it is no longer there."""
    path = model_path or base_path_of(folder)
    is_there = os.path.isdir(path)  # noqa: PTH112  # pathlib raises if a name is longer than the file system allows
    if not model_path and path.startswith(("/", ".")) and not is_there:
        raise BadModel(f"{folder} was trained on {path}, which is no longer there. Pass --model_path with the base.")
    return path


def base_path_of(folder: Path) -> str:
    """The path of the base that an adapter was trained on, from the adapter's config."""
    refuse_whole_model(folder)
    file = folder / ADAPTER_CONFIG
    base = checked(file, AdapterConfig).base_model_name_or_path
    if not base:
        raise BadModel(f"{file}: base_model_name_or_path names no base. Pass --model_path with the base.")
    return base


def short_names(folders: Sequence[Path]) -> list[str]:
    """Distinct names, none equal to BASE: the folders' names, with their parents' if two are equal, else full paths."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names) or BASE in names:
        names = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return names


def repeated(folders: Iterable[Path]) -> list[Path]:
    """The folders that are named more than once, also in another spelling: `out`, `out/` and `./out` are one."""
    counts = Counter(folder.resolve() for folder in folders)
    return [folder for folder, count in counts.items() if count > 1]


def adapter_config(folder: Path) -> PeftConfig:
    """PEFT's config of an adapter.

    Raises BadModel if it cannot be read, names no kind of adapter, or names a kind that would be computed wrongly here.
    """
    values = checked(folder / ADAPTER_CONFIG, AdapterConfig)
    if values.peft_type == "LORA":
        checked(folder / ADAPTER_CONFIG, LoraConfigFile)
    reasons = [reason for name, reason in _NOT_COMPUTED.items() if getattr(values, name)]
    if reasons:
        raise BadModel(
            f"{folder / ADAPTER_CONFIG}: this adapter cannot be used here, because {' and '.join(reasons)}. PEFT "
            "itself can."
        )
    with explained(str(folder), "adapter", files=ADAPTER_CONFIG):
        return PeftConfig.from_pretrained(str(folder))


def adapter_file(path: Path) -> Path | None:
    """The weights file that a path means: the path itself, or the file in the folder; None if there is none."""
    if path.is_file():
        return path
    for name in (WEIGHTS, OLD_WEIGHTS):
        if (path / name).is_file():
            return path / name
    return None


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Adapter tensors under PEFT's names, without the part `.default` of the tutorial's keys. No pickled code runs.

    Raises BadModel if the file cannot be read as tensors.
    """
    try:
        if file.suffix == ".safetensors":
            tensors: Mapping[str, Any] = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    # Both readers raise many kinds of errors for a file that is incomplete, a pickle or of another kind.
    except Exception as error:
        raise BadModel(
            f"{file}: its weights cannot be read as tensors: {type(error).__name__}: {str(error)[:300]}\n"
            "A file that holds a program (a pickle) is not run. An incomplete one can be copied again."
        ) from error
    return {name.replace(".default.", "."): tensor for name, tensor in tensors.items()}
