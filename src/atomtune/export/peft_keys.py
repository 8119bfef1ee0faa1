"""PEFT keys: a copy of an adapter's folder in which its layers have the names of another model class."""

import json
import re
import shutil
from pathlib import Path

from safetensors.torch import save_file

from atomtune.choices import ADAPTER_CONFIG, EXPORTED_FOR, RUN_RECORD
from atomtune.disk import read_json_object, text_of, write_json
from atomtune.model.adapter_folder import CERTIFICATE, PATTERNS, WEIGHTS, adapter_file, read_weights
from atomtune.model.adapter_keys import module_of, modules_of_class, new_names, with_new_names
from atomtune.model.json_files import json_object

_CARD = "README.md"
#: The line of a card that names the class of the base (model_card.py).
_IMPORT = re.compile(r"^from transformers import (?P<name>\w+), AutoTokenizer$", re.MULTILINE)
#: Files of a checkpoint that are not its adapter's: the state of the training, and the manifest of the old names.
_OF_A_CHECKPOINT = ("manifest.json", "trainer_state.json")
_PICKLES = (".pt", ".pth", ".bin")
#: The folder of a tokenizer with several chat templates.
_TEMPLATES = "additional_chat_templates"


def rewrite_keys(adapter: Path, out: Path, class_name: str, base_path: str, *, trust_remote_code: bool) -> int:
    """Write the adapter with the names of class_name; return how many tensors were renamed.

    Raises BadSettings for a class that transformers does not have, BadModel if a layer has no unique place in it.
    """
    modules = modules_of_class(class_name, base_path, trust_remote_code=trust_remote_code)
    file = adapter_file(adapter)
    assert file is not None, "adapter_and_base has read it"
    weights = read_weights(file)
    renamed = new_names(weights, modules)
    _copy(adapter, out)
    save_file({renamed[name]: tensor for name, tensor in weights.items()}, out / WEIGHTS, metadata={"format": "pt"})
    _rewrite_config(out / ADAPTER_CONFIG, {old: renamed[old] for old in weights})
    _mark_as_copy(out / RUN_RECORD, class_name)
    _name_class(out / _CARD, class_name)
    return sum(old != new for old, new in renamed.items())


def _copy(adapter: Path, out: Path) -> None:
    """Copy the adapter's own files, without the checkpoints, merged models and exports in the folder of a run.

    Not copied either: the certificate, which holds for the old names, and the state of the training in a checkpoint.
    The files are copied one by one: shutil.copytree reports a full disk as a list of all files, without errno.
    """
    out.mkdir(parents=True, exist_ok=True)
    for file in (*adapter.glob("*"), *(adapter / _TEMPLATES).glob("*")):
        left_out = file.name in (CERTIFICATE, *_OF_A_CHECKPOINT) or file.suffix in _PICKLES
        if file.is_file() and not file.name.startswith(".") and not left_out:
            goal = out / file.relative_to(adapter)
            goal.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, goal)


def _rewrite_config(file: Path, renamed: dict[str, str]) -> None:
    """Replace full names of layers and patterns by the new names; last parts (q_proj) mean the same in both classes."""
    values = json_object(file)
    modules = {module_of(old): module_of(new) for old, new in renamed.items()}
    # A pattern may match none of the new names. Tensors of target_parameters would not be layers.
    if isinstance(values.get("target_modules"), str) and not values.get("target_parameters"):
        values["target_modules"] = sorted({module_of(new) for new in renamed.values() if ".lora_" in new})
    for listed in ("target_modules", "modules_to_save"):
        if isinstance(values.get(listed), list):
            values[listed] = sorted(modules.get(name, name) for name in values[listed])
    for patterns in PATTERNS:
        if isinstance(values.get(patterns), dict):
            values[patterns] = with_new_names(values[patterns], modules)
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _mark_as_copy(record: Path, class_name: str) -> None:
    """Note in a copied run.json that this folder is a copy, so that `runs` does not list the run twice.

    Everything else stays: evaluate and certify find the run's records with it, and web its first questions.
    """
    if not record.is_file():
        return
    try:
        values = read_json_object(record)
    except (OSError, ValueError):  # the commands that need it report the damage
        return
    write_json(record, {**values, EXPORTED_FOR: class_name})


def _name_class(card: Path, class_name: str) -> None:
    """Let a copied model card load the base with the class whose names the copy has."""
    text = text_of(card) if card.is_file() else ""
    if named := _IMPORT.search(text):
        card.write_text(re.sub(rf"\b{named['name']}\b", class_name, text), encoding="utf-8")
