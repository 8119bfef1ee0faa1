"""Model card: README.md next to an adapter: what it is, its records and settings, and how to use it.

It says only what the run knows. It holds no path of this machine and no text of a record, because people share an
adapter's folder; and no time, so that the same run writes the same card.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from atomtune import __version__
from atomtune.data.encoding.chat_template import OWN
from atomtune.disk import text_of
from atomtune.model.adapter_folder import AdapterMetadata
from atomtune.settings.entry import DEFAULT, OWN_DEFAULT

#: Settings that every card shows, even if the user did not set them.
_ALWAYS = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "lora_experts",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_seq_length",
    "dtype",
    "quantize",
    "seed",
)
#: Settings about folders and processes, which do not change the adapter.
_NOT_SHOWN = re.compile(
    r"_(path|dir|from_checkpoint|token|key|secret|password|minutes)$|^(resume|checkpoint|report_to)"
)
#: A line of a card's front matter, which is YAML.
_LICENCE = re.compile(r"^license:[ \t]*(?P<quote>[\"']?)(?P<name>[\w.+-]+)(?P=quote)[ \t]*(#.*)?\r?$", re.MULTILINE)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
#: A model's folder in the hub's cache; names on the hub never have two hyphens in a row.
_HUB_CACHE = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)[\\/]snapshots[\\/]")


def model_card(record: Mapping[str, Any], metadata: AdapterMetadata, history: Sequence[Mapping[str, Any]]) -> str:
    """The text of README.md.

    record   run.json's values so far
    history  the Trainer's log: entries with `step` and `loss` or `eval_loss`
    """
    base = str(record["settings"]["model_path"]["value"])
    sections = [
        _front_matter(base),
        f"# A LoRA adapter for {shown_base(base)}",
        f"Trained with atomtune {__version__}. {_licence_sentence(base)}",
        _use(base, str(record.get("auto_class", "AutoModelForCausalLM")), metadata),
        _data(record),
        _settings(record["settings"]),
        _figures(history),
    ]
    return "\n\n".join(sections) + "\n"


def shown_base(base: str) -> str:
    """A hub's name, or the last part of a folder's path."""
    return hub_name(base) or Path(base).name


def hub_name(base: str) -> str | None:
    """A base's name on the hub, also for a folder in the hub's cache; None for any other folder."""
    if Path(base).exists():
        cached = _HUB_CACHE.search(base)
        return f"{cached['owner']}/{cached['name']}" if cached else None
    return base if _HUB_NAME.fullmatch(base) else None


def licence_of(base: str) -> str | None:
    """The licence named by the card in the base's folder; None if there is no card or folder."""
    try:
        text = text_of(Path(base) / "README.md")
    except (OSError, ValueError):
        return None
    front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    # Not parsed as YAML: an impossible date or 100,000 brackets in somebody's card would raise an error here.
    licence = front and _LICENCE.search(front[1])
    return licence["name"] if licence else None


def _front_matter(base: str) -> str:
    """The metadata that a hub reads. A base that is a local folder is not named."""
    values: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "atomtune"]}
    if name := hub_name(base):
        values["base_model"] = name
    if licence := licence_of(base):
        values["license"] = licence
    return "---\n" + yaml.safe_dump(values, sort_keys=True, allow_unicode=True) + "---"


def _licence_sentence(base: str) -> str:
    licence = licence_of(base)
    if licence is None:
        return "The licence of the base applies to what is made from it: look it up before you hand this on."
    return f"The base's licence is `{licence}`, which applies to what is made from it."


def _use(base: str, auto_class: str, metadata: AdapterMetadata) -> str:
    variables = metadata.template_variables
    template = f"{OWN} template" if metadata.template == OWN else f"the template `{metadata.template}`"
    lines = [
        "## How to use",
        "",
        "```bash",
        "atomtune chat --adapter_path THIS_FOLDER",
        "```",
        "",
        "or with PEFT alone:",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        'folder = "THIS_FOLDER"',
        f'base = {auto_class}.from_pretrained("{shown_base(base)}", dtype="auto")',
        "model = PeftModel.from_pretrained(base, folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)  # with the chat template of the training",
        'messages = [{"role": "user", "content": "Hello"}]',
        "prompt = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True' + _as_arguments(variables),
        ")",
        f'stop = tokenizer.convert_tokens_to_ids("{metadata.stop}")',
        "answer = model.generate(**prompt, eos_token_id=stop, max_new_tokens=200)",
        'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
        "",
        f"Prompts are written by {template}; an answer ends with `{metadata.stop}`.",
    ]
    if variables:
        said = ", ".join(f"{name}={value!r}" for name, value in variables.items())
        lines.append(f"The template was rendered with {said}.")
    if metadata.instruction is not None:
        lines.append("The records share an instruction (`instruction` in `atomtune.json`); requests need it too.")
    return "\n".join(lines)


def _as_arguments(variables: Mapping[str, Any]) -> str:
    """Code that adds arguments to a call, as a dict: a variable's name may not be valid in Python."""
    return f", **{dict(variables)!r}" if variables else ""


def _data(record: Mapping[str, Any]) -> str:
    names = {
        "records_read": "records read",
        "records_used": "records used",
        "records_refused": "records refused",
        "records_cut": "records shortened",
        "records_held_out": "records held out, not learned",
        "prompt_tokens": "tokens of prompts",
        "target_tokens": "tokens learned",
    }
    lines = ["## Training data", "", "| | |", "|---|---|"]
    paths = record.get("data", {}).get("path") or []
    for path in [paths] if isinstance(paths, str) else paths:
        lines.append(f"| from | `{shown_base(str(path))}` |")
    for name, words in names.items():
        value = record.get(name)
        count = len(value) if isinstance(value, list) else value
        if isinstance(count, int):
            lines.append(f"| {words} | {count:,} |")
    if fingerprint := record.get("data", {}).get("sha256"):
        lines.append(f"| SHA-256 | `{fingerprint}` |")
    return "\n".join(lines)


def _settings(settings: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["## Settings", "", "| setting | value |", "|---|---|"]
    for name, entry in settings.items():
        is_chosen = entry["source"] not in (DEFAULT, OWN_DEFAULT)
        if (is_chosen or name in _ALWAYS) and not _NOT_SHOWN.search(name) and entry["value"] is not None:
            lines.append(f"| `{name}` | {_shown(entry['value'])} |")
    return "\n".join([*lines, "", "All others have their defaults; `run.json` of the run lists every one."])


def _is_a_place(value: str) -> bool:
    """Whether a value is a file or folder of this machine."""
    return value.startswith("~") or Path(value).is_absolute() or (len(value) < 256 and Path(value).exists())


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_shown(part) for part in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str) and _is_a_place(value):  # a template's file, a file with DeepSpeed's settings
        return shown_base(value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _figures(history: Sequence[Mapping[str, Any]]) -> str:
    training = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    lines = ["## Figures", "", "Loss in nats per learned token.", "", "| | step | loss |", "|---|---|---|"]
    for name, points in (("training", training), ("held-out records", held_out)):
        if points:
            lines.append(f"| {name}, first | {points[0][0]:,} | {points[0][1]:.4f} |")
            lines.append(f"| {name}, last | {points[-1][0]:,} | {points[-1][1]:.4f} |")
    if held_out:
        step, loss = min(held_out, key=lambda point: point[1])
        lines.append(f"| held-out records, best | {step:,} | {loss:.4f} |")
    if not held_out:
        lines += [
            "",
            "No records were held out, so these figures say how well the records were learned, not how well new ones "
            "are answered. `atomtune evaluate --adapter_path THIS_FOLDER --dataset_path TEST.jsonl` measures that.",
        ]
    return "\n".join(lines)
