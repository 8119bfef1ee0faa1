"""The store: finished examples kept as Arrow files, found again by what they were made of.

The key is a hash of the file's bytes, the tokenizer, the template and the settings: a changed file, or any other
change that could change one token, has another key, so an old file is never served for it.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy
from datasets.arrow_writer import ArrowWriter

from atomtune.data.encode import Overlength, encode
from atomtune.data.files import read_values
from atomtune.data.records import Account, Example
from atomtune.data.template import Template
from atomtune.errors import BadData

FEATURES = datasets.Features(
    {
        "ids": datasets.List(datasets.Value("int32")),
        "learn": datasets.List(datasets.Value("int8")),
        "origin": datasets.Value("string"),
        "length": datasets.Value("int32"),  # read by the Trainer's group_by_length sampling
        "digest": datasets.Value("int64"),  # equal for equal ids and marks
    }
)


def file_hash(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _code_hash() -> str:
    """Of this room's own code and templates: examples made by other rules are not these."""
    files = sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".jinja"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def tokenizer_text(tokenizer: Any) -> str:
    """Everything about a tokenizer that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    # A tokenizer written in Python has rules outside its vocabulary; its arguments choose among them.
    arguments = {} if backend is not None else {k: str(v) for k, v in sorted(tokenizer.init_kwargs.items())}
    return json.dumps([type(tokenizer).__name__, body, str(tokenizer.special_tokens_map), arguments])


def examples_of(
    path: Path,
    template: Template,
    *,
    max_tokens: int,
    overlength: Overlength = "shorten",
    advance: Callable[[int], None] = lambda n_bytes: None,
    cache_dir: Path | None = None,
) -> tuple[datasets.Dataset, Account, str]:
    """All examples of a file (columns ids, learn, origin, length), their account, and the file's hash.

    Served from the store when nothing changed. advance is called with bytes read.
    Raises BadData for a file that cannot be read.
    """
    if not path.is_file():
        next(iter(read_values(path)))  # raises with the reason
    data_hash = file_hash(path)
    key = hashlib.sha256(
        json.dumps(
            [
                _code_hash(),
                datasets.__version__,
                data_hash,
                path.name,
                template.source,
                template.stop,
                template.instruction_role,
                max_tokens,
                overlength,
                tokenizer_text(template.tokenizer),
            ]
        ).encode()
    ).hexdigest()[:32]
    folder = (cache_dir or Path(datasets.config.HF_DATASETS_CACHE)) / "atomtune" / key
    if (folder / "account.json").is_file():
        advance(path.stat().st_size)
    else:
        account = Account()
        _write(
            folder,
            account,
            encode(read_values(path, advance), template, account, max_tokens=max_tokens, overlength=overlength),
        )
    account = Account.from_json(json.loads((folder / "account.json").read_text(encoding="utf-8")))
    if account.records_used == 0:
        return datasets.Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES), account, data_hash
    return datasets.Dataset.from_file(str(folder / "examples.arrow")), account, data_hash


def _write(folder: Path, account: Account, examples: Iterator[Example]) -> None:
    """Fill a folder beside the final one and rename it: a killed run leaves no half-made entry."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".new-*"):  # of processes that were killed; a living one is younger than a day
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as made:
        writer = ArrowWriter(path=str(Path(made) / "examples.arrow"), features=FEATURES)
        for example in examples:
            writer.write(_row(example))
        if account.records_read == 0:
            raise BadData(
                "The data file holds no records. Expected one JSON object a line: instruction, input, output."
            )
        writer.finalize()
        writer.close()
        account.records_copied = _copies(Path(made) / "examples.arrow") if account.records_used else 0
        (Path(made) / "account.json").write_text(json.dumps(account.to_json(), ensure_ascii=False), encoding="utf-8")
        done = Path(made).rename(folder.with_suffix(f".{Path(made).name[5:]}"))
    try:
        done.rename(folder)
    except OSError:  # another process finished the same entry first; its content is equal
        for file in done.iterdir():
            file.unlink()
        done.rmdir()


def _copies(arrow: Path) -> int:
    """How many rows repeat an earlier one; eight bytes of memory a row."""
    digests = datasets.Dataset.from_file(str(arrow)).with_format("numpy")["digest"][:]
    return len(digests) - len(numpy.unique(digests))


def _digest(example: Example) -> int:
    content = numpy.array([example.ids, example.learn], dtype=numpy.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), signed=True)


def _row(example: Example) -> dict[str, Any]:
    return {
        "ids": example.ids,
        "learn": example.learn,
        "origin": example.origin,
        "length": len(example.ids),
        "digest": _digest(example),
    }


def as_example(row: Mapping[str, Any]) -> Example:
    """A row of the store as the frozen value it was made from."""
    return Example(tuple(row["ids"]), tuple(row["learn"]), row["origin"])
