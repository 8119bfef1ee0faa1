"""Trained: what an adapter's folder says about how to use it."""

from pathlib import Path

from atomtune.data.encoding.chat_template import Template, load_template, restore_template
from atomtune.errors import BadModel
from atomtune.model.adapter import Card, base_path_of
from atomtune.model.load import load_tokenizer


def template_of(folder: Path, *, trust_remote_code: bool) -> tuple[Template, Card]:
    """The training template of a saved adapter or merged model, with its card.

    Whether code that comes with a model may run is the user's word each time, never a downloaded folder's.

    A folder of another tool has no card; then its tokenizer's own template, else atom, is taken.
    """
    if not folder.is_dir():
        raise BadModel(f"{folder}: no such folder. Pass --adapter_path with a run's output folder.")
    card = Card.load(folder)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    if card is not None:
        return restore_template(card.template, card.instruction_role, tokenizer), card
    template = load_template("auto", tokenizer)
    return template, Card(template=template.name, instruction_role=template.instruction_role, stop=template.stop)


def base_of(adapter: Path, model_path: str | None) -> str:
    """The base's path: as given, else as the adapter names it."""
    path = model_path or base_path_of(adapter)
    if not model_path and path.startswith(("/", ".")) and not Path(path).is_dir():
        raise BadModel(
            f"{adapter} was trained on {path}, which is not there any more. Pass --model_path with the base."
        )
    return path
