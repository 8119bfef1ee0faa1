"""PEFT keys: an adapter's folder written once more, with the names that another class has for its layers."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from atomtune.errors import BadModel
from atomtune.model.adapter_folder import CONFIG, WEIGHTS, adapter_file, read_weights
from atomtune.model.adapter_keys import module_of, modules_of_class, new_names
from atomtune.model.json_files import json_object


def rewrite_keys(adapter: Path, out: Path, class_name: str, base_path: str, *, trust_remote_code: bool) -> int:
    """Write the adapter with the names that class_name has; how many tensors got another name.

    Raises BadSettings for a class that transformers does not have, BadModel where a layer has no one place in it.
    """
    modules = modules_of_class(class_name, base_path, trust_remote_code=trust_remote_code)
    file = adapter_file(adapter)
    if file is None:
        raise BadModel(f"{adapter}: no adapter weights here.")
    weights = read_weights(file)
    renamed = new_names(weights, modules)
    shutil.copytree(adapter, out, dirs_exist_ok=True, ignore=_not_copied)
    save_file({renamed[name]: tensor for name, tensor in weights.items()}, out / WEIGHTS, metadata={"format": "pt"})
    _rewrite_targets(out / CONFIG, {old: renamed[old] for old in weights})
    return sum(old != new for old, new in renamed.items())


def _not_copied(folder: str, names: list[str]) -> set[str]:
    """Of a folder's names: what a run leaves beside its adapter, and what is neither file nor folder, as a pipe."""
    of_a_run = {name for name in names if name.startswith((".", "checkpoint-")) or name == "evaluation"}
    return of_a_run | {name for name in names if not (Path(folder, name).is_file() or Path(folder, name).is_dir())}


def _rewrite_targets(file: Path, renamed: dict[str, str]) -> None:
    """Targets that are full names get the new ones; last parts of names, as q_proj, mean the same in both classes."""
    values = json_object(file)
    modules = {module_of(old): module_of(new) for old, new in renamed.items()}
    if isinstance(values.get("target_modules"), list):
        values["target_modules"] = sorted(modules.get(target, target) for target in values["target_modules"])
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
