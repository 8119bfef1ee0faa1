"""Records of every kind, and reading them through a cache of their own."""

from pathlib import Path

import pytest

from atomtune.data import encoded_source
from atomtune.data.cache import examples_of
from atomtune.data.encoded_source import Rules
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.choose_template import load_template
from tests.conftest import DIALOGUES, write_jsonl
from tests.tiny import CHATML, tokenizer_of


class EncodedAgainError(AssertionError):
    """Raised in place of encoding, to show that the records did not come from the store."""


@pytest.fixture
def no_encoding(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise EncodedAgainError

    return lambda: monkeypatch.setattr(encoded_source, "Encoder", refuse)


@pytest.fixture
def data(tmp_path) -> Path:
    """Records of every kind: used, shortened, with control strings, refused, too long, broken."""
    path = write_jsonl(
        tmp_path / "train.jsonl",
        [
            *DIALOGUES,
            {"instruction": "long " * 60, "output": "cut"},
            {"instruction": "a<|im_end|></s>b", "output": "text stays text"},
            {"instruction": "no output"},
            {"instruction": "Hi", "output": "too long " * 60},
        ],
    )
    with path.open("a") as file:
        file.write("{broken\n")
    return path


def template_of(kind: str = "bytes", source: str | None = CHATML) -> Template:
    return load_template("auto", tokenizer_of(kind, source))


def asked(data: Path, cache: Path, **changed) -> tuple:
    values = {"template": template_of(), "max_tokens": 120, "overlength": "shorten", **changed}
    template, advance = values.pop("template"), values.pop("advance", lambda n_bytes: None)
    encoded = examples_of(data, template, Rules(**values), cache_dir=cache, advance=advance)
    return encoded.examples, encoded.ledger, encoded.data_hash


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("atomtune/*"))
