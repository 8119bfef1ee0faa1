"""YAML: the top-level `name: value` lines of a settings file, with their line numbers."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from atomtune.language import message
from atomtune.settings.entry import Entry

MOST_BYTES = 1_000_000  # a settings file is about a page long
MOST_DEPTH = 20
MOST_NODES = 10_000  # counted with all aliases expanded, because ten lines of aliases can have a billion values


class _Yaml(yaml.SafeLoader):
    """A loader with YAML 1.2's plain values: 1e-4 is a number, `no` and dates are text. PyYAML follows YAML 1.1."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # as PyYAML declares it


_Yaml.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)

#: Suffixes of files with records, which are never settings; a .json file may be either.
_OF_RECORDS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
#: Frequent mistakes, by the beginning of PyYAML's message.
_MISTAKES = {
    "mapping values are not allowed": message(
        "a second `: ` in one setting, or a line that begins further to the right than the one above it; a text that "
        "holds `: ` needs quotes"
    ),
    "expected ',' or ']'": message("a [ that is not closed"),
    "expected ',' or '}'": message("a { that is not closed"),
    "found unexpected end of stream": message("a quotation mark that is not closed"),
    "found character '\\t'": message("a tab; only spaces may come before a setting"),
    "found character": message("a value that begins with @, ` or % needs quotes"),
    "could not find expected ':'": message("a line without `: ` after its name"),
    "expected <block end>": message("a line that begins further to the left or right than the others"),
    "expected '<document start>'": message("a line that begins further to the left or right than the others"),
    "found undefined alias": message("a value that begins with * needs quotes"),
    "expected alphabetic or numeric character": message("a value that begins with * or & needs quotes"),
    "found unknown escape character": message("a \\ within double quotes; single quotes take it as it is"),
    "expected escape sequence": message("a \\ within double quotes; single quotes take it as it is"),
    "but found another document": message("a line of `---`; one file holds the settings of one run"),
    "special characters are not allowed": message("a control character"),
}


class _Refused(Exception):
    """A file that is not YAML of settings, or a value that is not plain."""


def yaml_entries(path: Path, problems: list[str], known: Callable[[str, str, bool], str | None]) -> dict[str, Entry]:
    """setting → entry. Whatever cannot be read is added to `problems`.

    known  (name, place, whether it has a value) → the setting that a key means; None to leave the line out
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
        name = known(str(key.value), place, not node.tag.endswith(":null"))
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
    """The file's top-level mapping; None if the file is empty. Raises _Refused for anything else."""
    text = _text(path)
    try:
        tree = yaml.compose(text, Loader=_Yaml)
    except RecursionError:
        raise _Refused(f"{path}: nested too deeply; a setting is a value, a list or a small mapping.") from None
    except yaml.YAMLError as error:
        raise _Refused(f"{_place(path, error, text)}: not YAML: {_mistake(error)}.") from None
    if tree is not None and not isinstance(tree, yaml.MappingNode):
        raise _Refused(f"{path}: expected lines of `name: value`.")
    return tree


def _place(path: Path, error: yaml.YAMLError, text: str) -> str:
    """The file and line of a mistake; something left open at the end of the file is reported at the last line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(path)
    return f"{path.name}:{min(mark.line + 1, max(len(text.splitlines()), 1))}"


def _mistake(error: yaml.YAMLError) -> str:
    """What is wrong, for someone writing settings: PyYAML's own messages are for parsers and span several lines."""
    problem = str(getattr(error, "problem", None) or getattr(error, "reason", ""))
    fitting = (text for beginning, text in _MISTAKES.items() if problem.startswith(beginning))
    return next(fitting, "it cannot be read from here on")


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
    """A plain value stays as written, and is converted by the type of its setting, like a flag: 007 may be a name."""
    _refuse_unusual(node)
    if isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] in ("int", "float", "bool"):
        return node.value
    try:
        return _Yaml("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, LookupError) as error:  # for example `!!int x`
        raise _Refused(f"cannot be read: {error}") from None


def _refuse_unusual(top: yaml.Node) -> None:
    """Raise _Refused for tags, for deep nesting, and for aliases that expand to very many values."""
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
                raise _Refused(f"{twice[0]} is set twice")  # PyYAML would silently use the second one
            for key, value in node.value:
                waiting += [(key, depth + 1), (value, depth + 1)]
