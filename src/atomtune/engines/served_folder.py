"""Served folder: base and adapter in one folder that every loader of transformers accepts.

An adapter's folder has no config.json, which `transformers serve` needs. With one, transformers treats the folder as a
model with an adapter in it. So the view has links to the base's files and to the adapter's, under the adapter's own
name, which becomes the model's name. If the adapter has a tokenizer and template, they replace the base's.
"""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from atomtune.choices import ADAPTER_CONFIG, GENERATION_CONFIG, MODEL_CONFIG, TOKENIZER_FILES
from atomtune.disk import read_json_object
from atomtune.errors import BadModel
from atomtune.folders import TemporaryFolder

TOKENIZER_CONFIG = "tokenizer_config.json"
#: For `transformers serve`: everything the model writes is content, not thoughts or tool calls.
_ALL_IS_CONTENT = {
    "start_anchor_pattern": r"\Z",  # after the prompt
    "fields": {"content": {"content": "text", "content_args": {"strip": False}}},
}


class ServedFolder:
    """The folder that a server loads: the folder itself, or a view of base and adapter that is removed at the end.

    base        path of the base, if it is not the one in the adapter's config
    stop_ids    ids that end an answer, in place of the base's; if empty, the base's
    as_written  whether `transformers serve` returns answers as the model writes them; otherwise it removes thoughts and
                calls from the text, for the model families that it knows
    """

    def __init__(
        self, folder: Path, *, base: str | None = None, stop_ids: Sequence[int] = (), as_written: bool = False
    ) -> None:
        self.folder, self.base, self.stop_ids = folder.resolve(), base, list(stop_ids)
        self.as_written = as_written
        self.view: TemporaryFolder | None = None

    def __enter__(self) -> Path:
        is_adapter = (self.folder / ADAPTER_CONFIG).is_file()
        if not is_adapter and not self.as_written:
            return self.folder
        files = self._files()
        self.view = TemporaryFolder("atomtune-serve-")
        view = self.view.path / self.folder.name
        try:
            view.mkdir()
            for name, file in files.items():
                _link(file, view / name)
            if is_adapter and self.stop_ids:
                _write_value(view / GENERATION_CONFIG, "eos_token_id", self.stop_ids)
            if self.as_written:
                _write_value(view / TOKENIZER_CONFIG, "response_template", _ALL_IS_CONTENT)
        except BaseException:
            self.__exit__()
            raise
        return view

    def _files(self) -> dict[str, Path]:
        """name → file of the view: a model's files; for an adapter, the base's files, replaced by its own."""
        own = {file.name: file for file in self.folder.iterdir() if file.is_file()}
        config = own.get(ADAPTER_CONFIG)
        if config is None:
            return own
        base = self.base or str(read_config_file(config).get("base_model_name_or_path"))
        try:
            config_of_base = Path(str(cached_file(base, MODEL_CONFIG)))
        except OSError as error:
            raise BadModel(f"{base}: the base that {config} names cannot be read: {str(error)[:200]}") from None
        of_base = {file.name: file for file in config_of_base.parent.iterdir() if file.is_file()}
        if has_tokenizer(self.folder):  # no file of the base may change the tokenization
            of_base = {name: file for name, file in of_base.items() if not _is_tokenizer_file(file)}
        return {**of_base, **own, MODEL_CONFIG: config_of_base}

    def __exit__(self, *exc: object) -> None:
        if self.view is not None:
            self.view.remove()
            self.view = None


def is_whole_model(folder: Path) -> bool:
    """Whether a folder holds a complete model, not an adapter."""
    return (folder / MODEL_CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file()


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has any tokenizer file; PEFT saves adapters without one."""
    return any(map(_is_tokenizer_file, folder.iterdir()))


def _is_tokenizer_file(file: Path) -> bool:
    return any(map(file.match, TOKENIZER_FILES))


def read_config_file(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises BadModel if it cannot be read."""
    try:
        return read_json_object(file)
    except (OSError, ValueError) as error:
        raise BadModel(f"{file} cannot be read: {str(error)[:200]}. Copy the folder again.") from None


def _write_value(file: Path, name: str, value: Any) -> None:
    """Set one value in a JSON file. A link is replaced by a copy first, since the original is not ours to change."""
    values = read_config_file(file) if file.is_file() else {}
    file.unlink(missing_ok=True)
    file.write_text(json.dumps({**values, name: value}), encoding="utf-8")


def _link(file: Path, target: Path) -> None:
    """Create a link, or a copy if the system does not allow links."""
    with contextlib.suppress(OSError):
        target.symlink_to(file.resolve())
        return
    shutil.copyfile(file, target)
