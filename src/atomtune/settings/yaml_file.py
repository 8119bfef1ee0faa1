"""YAML: the top-level `name: value` lines of a settings file, each with its line number."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from atomtune.settings.entry import Entry

MOST_BYTES = 1_000_000  # a settings file is a page long
MOST_DEPTH = 20
MOST_NODES = 10_000  # with every alias written out: ten lines of aliases can stand for a thousand million values


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's plain words: 1e-4 is a number, `no` is a word, a date is a word. PyYAML reads YAML 1.1."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # as PyYAML declares it


_Yaml.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)

#: Endings of files that hold records and never settings; a .json may be either.
_OF_RECORDS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _Refused(Exception):
    """A file that is no YAML of settings, or a value that is no plain one."""


def yaml_entries(path: Path, problems: list[str], known: Callable[[str, str], str | None]) -> dict[str, Entry]:
    """Setting → entry. Whatever cannot be read becomes a line of `problems`.

    known: (name, place) → the setting that a key means; None where it means none and a problem was reported.
    """
    try:
        tree = _tree(path)
    except _Refused as refused:
        problems.append(str(refused))
        return {}
    entries: dict[str, Entry] = {}
    for key, node in tree.value if tree else []:
        place = f"{path.name}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            problems.append(f"{place}: expected `name: value`.")
            continue
        name = known(str(key.value), place)
        if name is None:
            continue
        if name in entries:
            problems.append(f"{place}: {name} is set twice, here and at {entries[name].origin}. Remove one of them.")
            continue
        try:
            entries[name] = Entry(_value(node), place)
        except _Refused as refused:
            problems.append(f"{place}: {name}: {refused}.")
    return entries


def _tree(path: Path) -> yaml.MappingNode | None:
    """The file's top-level mapping; None where the file is empty. Raises _Refused for all else."""
    text = _text(path)
    try:
        tree = yaml.compose(text, Loader=_Yaml)
    except RecursionError:
        raise _Refused(f"{path}: nested too deeply; a setting is a value, a list or a small mapping.") from None
    except yaml.MarkedYAMLError as error:
        # PyYAML's own text is a drawing over several lines.
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _Refused(f"{path.name}:{line}: not YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise _Refused(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if tree is not None and not isinstance(tree, yaml.MappingNode):
        raise _Refused(f"{path}: expected lines of `name: value`.")
    return tree


def _text(path: Path) -> str:
    if path.is_dir():
        raise _Refused(f"{path}: a folder; expected a YAML file of settings.")
    if not path.is_file():
        raise _Refused(f"{path}: no such file. The first argument is a YAML file of settings; flags begin with --.")
    if path.suffix in _OF_RECORDS:
        raise _Refused(
            f"{path}: a file of records: pass it with --dataset_path. The first argument is a YAML file of settings."
        )
    if path.stat().st_size > MOST_BYTES:
        raise _Refused(f"{path}: larger than 1 MB; expected a file of settings, not of records.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise _Refused(f"{path}: not UTF-8 text. Save the file as UTF-8.") from None
    except OSError as error:
        raise _Refused(f"{path}: cannot be read: {error.strerror}.") from None


def _value(node: yaml.Node) -> Any:
    """A plain word stays as it is written, to be read by its setting's own type as behind a flag: 007 may be a name."""
    _refuse_unusual(node)
    if isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] in ("int", "float", "bool"):
        return node.value
    try:
        return _Yaml("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, LookupError) as error:  # as of `!!int x`
        raise _Refused(f"cannot be read: {error}") from None


def _refuse_unusual(top: yaml.Node) -> None:
    """Refuse tags, depth, and aliases that stand for very many values."""
    waiting = [(top, 0)]
    nodes = 0
    while waiting:
        node, depth = waiting.pop()
        nodes += 1
        if node.tag not in _PLAIN_TAGS:
            raise _Refused(f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} cannot be used here")
        if depth > MOST_DEPTH or nodes > MOST_NODES:
            raise _Refused("nested too deeply, or too many values")
        if isinstance(node, yaml.SequenceNode):
            waiting += [(item, depth + 1) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            names = Counter(str(key.value) for key, _ in node.value)
            if twice := [name for name, times in names.items() if times > 1]:
                raise _Refused(f"{twice[0]} is set twice")  # the second would be taken in silence
            for key, value in node.value:
                waiting += [(key, depth + 1), (value, depth + 1)]
