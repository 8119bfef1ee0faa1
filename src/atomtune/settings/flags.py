"""Flags: reads a command line, its YAML file or a function's keywords into values with their origins."""

import argparse
import json
import os
import re
import shlex
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

from atomtune.errors import BadSettings
from atomtune.settings.entry import Entry
from atomtune.settings.names import ELSEWHERE, VALUE_SYNONYMS, advice, synonym
from atomtune.settings.yaml_file import yaml_entries

#: The setting to which words without a flag belong: inspect FILE …, runs FOLDER …
PATHS_ARE = {"inspect": "dataset_path", "runs": "folder"}
#: Commands that take the settings of a run, or a YAML file with them.
OF_A_RUN = ("train", "plan", "sweep")
#: Settings that are text for the model.
TEXTS = ("prompt", "system")
#: Settings with folders of models. tokenizers and safetensors, written in Rust, need their names in UTF-8.
MODEL_FOLDERS = ("model_path", "adapter_path", "output_dir", "served", "checkpoint", "resume_from_checkpoint")
#: Settings with files of records.
RECORD_FILES = ("dataset_path", "eval_path")
_NEGATIVE_NUMBER = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)
_VALUE = "\0"  # prefix of a word that argparse would take for a flag; no command line can contain it


def flag_of(name: str) -> str:
    """`try_` → `--try`: `try` is a keyword in Python, so the name has an underscore."""
    return f"--{name.rstrip('_')}"


def types_of(groups: Sequence[type]) -> dict[str, Any]:
    """name → type, of every setting of these classes."""
    types: dict[str, Any] = {}
    for group in groups:
        types |= typing.get_type_hints(group)
    return types


class EntryReader:
    """Reads the command line, YAML file and keywords of one command into entries, and collects their problems."""

    def __init__(self, command: str, types: Mapping[str, Any]) -> None:
        self.command, self.types = command, types
        self.problems: list[str] = []
        self.translated: list[str] = []  # `--lr → --learning_rate`: names of other tools that were translated
        self.repeated: dict[str, None] = {}  # flags that occur twice on the command line, in order

    def read(self, argv: Sequence[str]) -> dict[str, Entry]:
        """Entries of the YAML file, replaced by those of flags."""
        values = self._parsed(argv)
        entries = self._yaml_entries(values.pop("yaml", None), values.pop("config", None))
        paths = values.pop("paths", None)
        if paths:
            name = PATHS_ARE[self.command]
            entries[name] = Entry(paths, f"--{name}")
        for name, value in values.items():
            if value is not None:
                entries[name] = Entry(_words(value), flag_of(name))
        return self._checked(entries)

    def read_keywords(self, values: Mapping[str, Any]) -> dict[str, Entry]:
        """Entries of keywords, read like lines of a YAML file; None keeps a default. `config` is a file of settings."""
        origin = f"{self.command}()"
        values = {key: value for key, value in values.items() if value is not None}
        entries: dict[str, Entry] = {}
        foreign: list[str] = []
        if self.command in OF_A_RUN and "config" in values:
            entries = self._yaml_of_keyword(values.pop("config"), origin)
        for key, value in values.items():
            name = self._known_key(key, origin)
            if name is None:
                continue
            try:
                entries[name] = Entry(_as_written(value), origin)
            except TypeError as error:
                file = " Write the records to a file first, and pass its name." if name in RECORD_FILES else ""
                foreign.append(f"{origin}: {key}: {error}; expected a text, a number, or a list of these.{file}")
        if foreign:  # it would be taken for missing, and reported again
            raise BadSettings([*self.problems, *foreign])
        return self._checked(entries)

    def _yaml_of_keyword(self, config: Any, origin: str) -> dict[str, Entry]:
        if isinstance(config, str | os.PathLike):
            return self._yaml_entries(os.fspath(config))
        self.problems.append(
            f"{origin}: config is a {type(config).__name__}; expected the path of a YAML file. Settings themselves are "
            "keywords: lora_rank=8."
        )
        return {}

    def _checked(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """The entries with translated values; characters that are invalid in file names or text become a problem."""
        for name, entry in entries.items():
            words = entry.value if isinstance(entry.value, list) else [entry.value]
            if name in (*MODEL_FOLDERS, *RECORD_FILES) and "" in words:
                self.problems.append(
                    f"{entry.place(name)}: expected a name; an empty one would mean the working directory. Is a "
                    "variable not set? Leave it out, or write `.`."
                )
            elif not all(_is_writable(word, is_name=name not in TEXTS) for word in words):
                self.problems.append(
                    f"{entry.place(name)}: it contains a NUL or an incomplete character. {_remedy('Type it again.')}"
                )
            elif name in MODEL_FOLDERS and not all(map(_is_in_utf8, words)):
                self.problems.append(
                    f"{entry.place(name)}: the libraries that read and write models find a folder by its name in "
                    f"UTF-8, and this name is not in UTF-8 here. {_remedy('Rename it.')}"
                )
        return {name: self._in_our_words(name, entry) for name, entry in entries.items()}

    def _parsed(self, argv: Sequence[str]) -> dict[str, Any]:
        """The words parsed by argparse: name → a word, words, or None if it is not set."""
        known_words = list(self._known_words(argv))
        try:
            parsed, unused = parser_of(self.command, self.types).parse_known_args(known_words)
        except argparse.ArgumentError as error:
            reason = error.message.replace("expected one argument", "its value is missing")
            reason = reason.replace("expected at least one argument", "its value is missing")
            raise BadSettings([*self.problems, f"{error.argument_name or self.command}: {reason}."]) from None
        self.problems += [self._of_no_setting(word) for word in unused]
        return vars(parsed)

    def _of_no_setting(self, word: str) -> str:
        """The message for a word without a flag; a folder is probably meant as the adapter."""
        if "adapter_path" in self.types and Path(word).is_dir():
            return f"{word}: belongs to no setting. Did you mean --adapter_path {shlex.quote(word)}?"
        return f"{word}: belongs to no setting."

    def _yaml_entries(self, *paths: str | None) -> dict[str, Entry]:
        """The settings of run.yaml, which may also be given as `--config run.yaml`."""
        files = [path for path in paths if path]
        if len(files) > 1:
            self.problems.append(f"{' and '.join(files)}: only one file of settings is read. Pass only one of them.")
        entries: dict[str, Entry] = {}
        for file in files:
            entries |= self.read_yaml(Path(file))
        return entries

    def _in_our_words(self, name: str, entry: Entry) -> Entry:
        ours = VALUE_SYNONYMS.get((name, str(entry.value).lower()))
        if ours is None:
            return entry
        self.translated.append(f"{name} {entry.value} → {ours}")
        return replace(entry, value=ours)

    def read_yaml(self, path: Path) -> dict[str, Entry]:
        return yaml_entries(path, self.problems, self._known_key)

    def _known_words(self, argv: Sequence[str]) -> Iterator[str]:
        """The words without unknown flags and their values; each unknown flag becomes a problem."""
        skipping, seen = False, set()
        for word in argv:
            if word.startswith("--"):
                name, equals, value = word[2:].partition("=")
                flag = self._known_flag(name.replace("-", "_"))
                skipping = flag is None
                if flag is not None:
                    if flag in seen and arity(self.types.get(flag)).get("action") != "extend":
                        self.repeated[flag_of(flag)] = None
                    seen.add(flag)
                    yield f"{flag_of(flag)}{equals}{value}"
            elif not skipping:
                # argparse recognises `-1` as a number, but takes `-1e-4` and `-inf` for flags.
                yield f"{_VALUE}{word}" if _NEGATIVE_NUMBER.match(word) else word

    def _known_flag(self, name: str) -> str | None:
        name = f"{name}_" if f"{name}_" in self.types else name
        if name in self.types or (self.command in OF_A_RUN and name == "config"):
            return name
        ours = synonym(name, self.types)
        if ours:
            self.translated.append(f"--{name} → --{ours}")
            return ours
        self.problems.append(f"--{name}: {advice(name, self.types, in_yaml=False)}")
        return None

    def known_setting(self, name: str) -> str | None:
        """A setting's name as in `--try name=…`; None, and a problem, if it is unknown."""
        return self._known_flag(name.strip().replace("-", "_"))

    def _known_key(self, key: str, place: str, has_value: bool = True) -> str | None:
        """The setting that a key means; None, and a problem, if it is unknown.

        None, and no problem, for a key of another tool that has no value.
        """
        name = key.replace("-", "_")
        name = f"{name}_" if f"{name}_" in self.types else name
        if name in self.types:
            return name
        ours = synonym(name, self.types)
        if not has_value and (ours or name in ELSEWHERE):
            return None
        if ours:
            self.translated.append(f"{place} {key} → {ours}")
            return ours
        self.problems.append(f"{place}: {key}: {advice(name, self.types, in_yaml=True)}")
        return None


def _words(value: str | list[str]) -> str | list[str]:
    """A flag's value as typed; a single value of a flag that takes several is not a list."""
    if isinstance(value, str):
        return value.removeprefix(_VALUE)
    words = [word.removeprefix(_VALUE) for word in value]
    return words[0] if len(words) == 1 else words


def _is_writable(word: object, *, is_name: bool) -> bool:
    """False for a word with NUL or a lone surrogate, which YAML can contain but no system call accepts.

    is_name  a file's name may contain bytes that are not UTF-8, which Python represents as lone surrogates
    """
    if not isinstance(word, str):
        return True
    try:
        word.encode("utf-8", "surrogateescape" if is_name else "strict")
    except UnicodeEncodeError:
        return False
    return "\0" not in word


def _is_in_utf8(name: object) -> bool:
    """Whether the bytes of a name are its UTF-8 encoding, which is not so in other locales or for other bytes."""
    try:
        return not isinstance(name, str) or os.fsencode(name) == name.encode()
    except UnicodeEncodeError:
        return False


def _remedy(otherwise: str) -> str:
    is_utf8 = sys.getfilesystemencoding() == "utf-8"
    return otherwise if is_utf8 else "Set PYTHONUTF8=1: this locale has another encoding."


def _as_written(value: Any) -> str | list[str]:
    """A Python value as it would be written in YAML, so that all sources of settings are read and checked alike.

    Raises TypeError, naming the type, for a value that no file of settings can hold: records, an array, a model.
    """
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False, default=_word)
    if isinstance(value, list | tuple):
        return [_word(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_word, value))
    return _word(value)


def _word(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if callable(value) or (isinstance(value, Iterable) and not isinstance(value, str)):
        raise TypeError(f"its value is of the type {type(value).__name__}")
    return str(value).lower() if isinstance(value, bool) else str(value)


def parser_of(command: str, types: Mapping[str, Any]) -> argparse.ArgumentParser:
    """The flags of a command. Its help is in settings/help.py."""
    parser = argparse.ArgumentParser(
        prog=f"atomtune {command}", allow_abbrev=False, exit_on_error=False, add_help=False
    )
    if command in OF_A_RUN:
        parser.add_argument("yaml", nargs="?")
        parser.add_argument("--config")  # the name that other tools use
    if command in PATHS_ARE:
        parser.add_argument("paths", nargs="*")
    for name, kind in types.items():
        parser.add_argument(flag_of(name), dest=name, **arity(kind))
    return parser


def arity(kind: Any) -> dict[str, Any]:
    """How many words a flag takes: a boolean none or one, a list one or more, all others one."""
    parts = {kind, *typing.get_args(kind)}  # for list[str] | None: itself, list[str] and None
    if bool in parts or "true" in parts:
        return {"nargs": "?", "const": "true"}
    if any(typing.get_origin(part) is list for part in parts):
        return {"nargs": "+", "action": "extend"}
    return {}
