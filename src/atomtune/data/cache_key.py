"""Cache key: everything that decides which tokens a file's records become, as one hash.

It covers the file's bytes, the tokenizer, the template, the settings, the code of data/ and the versions of the
libraries that make tokens.
"""

import contextlib
import hashlib
import inspect
import json
import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from atomtune.data.encoding.chat_template import Template

#: Libraries that read records, render templates or make tokens; the last four only for tokenizers written in Python.
_LIBRARIES = (
    *("datasets", "jinja2", "tokenizers", "transformers"),
    *("mistral-common", "regex", "sentencepiece", "tiktoken"),
)
_RELATIVE_IMPORT = re.compile(rb"^\s*from\s+\.(\w+)\s+import", re.MULTILINE | re.ASCII)


def cache_key(name: str, data_hash: str, template: Template, rules: str) -> str:
    """A hash of everything that could change a token or an origin; 32 hex digits.

    name   of the source in origins
    rules  the settings of reading and encoding, as text
    """
    made_of = [
        _code_hash(),
        *_versions(),
        data_hash,
        name,
        *template.made_of(),
        rules,
        tokenizer_text(template.tokenizer),
    ]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]


def _versions() -> list[str]:
    """The versions of the installed libraries that read records, render templates or make tokens."""
    versions = []
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{library} {version(library)}")
    return versions


@cache
def _code_hash() -> str:
    """SHA-256 of the code and templates in data/: another version of them may encode differently."""
    files = sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".jinja"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def tokenizer_text(tokenizer: Any) -> str:
    """Everything that decides which ids the tokenizer gives to a text, as JSON for the cache key."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    arguments: dict[str, str] = {}
    if backend is not None:
        body = backend.to_str()
    else:
        body = json.dumps(sorted(tokenizer.get_vocab().items()))
        # A tokenizer written in Python has rules besides its vocabulary; its arguments select among them.
        for name, value in sorted(tokenizer.init_kwargs.items()):
            arguments[name] = str(value)
    parts = [type(tokenizer).__name__, body, str(tokenizer.special_tokens_map), arguments]
    if code := _own_code(type(tokenizer)):
        parts.append(code)
    return json.dumps(parts)


def _own_code(tokenizer_class: type) -> str:
    """SHA-256 of a tokenizer's code that comes with its model, and of what that imports from the files beside it.

    Returns "" for a class of a library, whose version is part of the key.
    """
    waiting: list[Path] = []
    for base in tokenizer_class.__mro__:
        if base.__module__.partition(".")[0] not in {*_LIBRARIES, *sys.stdlib_module_names}:
            with contextlib.suppress(OSError, TypeError):  # it was typed into a notebook
                waiting.append(Path(inspect.getfile(base)))
    codes: dict[Path, bytes] = {}
    while waiting:
        file = waiting.pop()
        if file not in codes and file.is_file():
            codes[file] = file.read_bytes()
            waiting += [file.with_name(f"{name.decode()}.py") for name in _RELATIVE_IMPORT.findall(codes[file])]
    if not codes:
        return ""
    return hashlib.sha256(b"".join(codes[file] for file in sorted(codes))).hexdigest()
