"""Served folder: base and adapter in the one form that every loader of transformers takes.

An adapter's folder alone has no config.json, which `transformers serve` asks for; with one, transformers takes the
folder for a whole model with an adapter in it. So that is what it gets: links to the base's files and the adapter's,
under the adapter's own name, which becomes the model's name. The adapter's tokenizer and template win.
"""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from atomtune.disk import TemporaryFolder, read_json_object
from atomtune.errors import BadModel

ADAPTER_CONFIG = "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
#: Of the base: what decides how text becomes ids is the adapter's.
_NOT_OF_BASE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*")


class ServedFolder:
    """What a server is pointed at: the folder itself, or a view of base and adapter that is removed in the end.

    base      where the base is, if not where the adapter's config says
    stop_ids  where answers end, in place of the base's; none: as the base says
    """

    def __init__(self, folder: Path, *, base: str | None = None, stop_ids: Sequence[int] = ()) -> None:
        self.folder, self.base, self.stop_ids = folder.resolve(), base, list(stop_ids)
        self.view: TemporaryFolder | None = None

    def __enter__(self) -> Path:
        config = self.folder / ADAPTER_CONFIG
        if not config.is_file():
            return self.folder
        base = self.base or str(read_config(config).get("base_model_name_or_path"))
        try:
            of_base = Path(str(cached_file(base, "config.json"))).parent
        except OSError as error:
            raise BadModel(f"{base}: the base that {config} names cannot be read: {str(error)[:200]}") from None
        self.view = TemporaryFolder("atomtune-serve-")
        view = self.view.path / self.folder.name
        view.mkdir()
        for file in of_base.iterdir():
            if file.is_file() and not any(file.match(pattern) for pattern in _NOT_OF_BASE):
                _link(file, view / file.name)
        for file in self.folder.iterdir():
            if file.is_file() and file.name != "config.json":
                (view / file.name).unlink(missing_ok=True)
                _link(file, view / file.name)
        if self.stop_ids:
            self._write_stops(view / GENERATION_CONFIG)
        return view

    def _write_stops(self, file: Path) -> None:
        values = read_config(file) if file.is_file() else {}
        file.unlink(missing_ok=True)  # a link into the base's folder, which is not ours to change
        file.write_text(json.dumps({**values, "eos_token_id": self.stop_ids}), encoding="utf-8")

    def __exit__(self, *exc: object) -> None:
        if self.view is not None:
            self.view.remove()
            self.view = None


def read_config(file: Path) -> dict[str, Any]:
    """A JSON file beside weights. Raises BadModel where it is none."""
    try:
        return read_json_object(file)
    except (OSError, ValueError) as error:
        raise BadModel(f"{file} cannot be read: {str(error)[:200]}. Copy the folder again.") from None


def _link(file: Path, target: Path) -> None:
    """A link; a copy where the system allows none."""
    with contextlib.suppress(OSError):
        target.symlink_to(file.resolve())
        return
    shutil.copyfile(file, target)
