"""Messages: all texts in the source that a person reads, and those that the Chinese catalogue does not have yet.

python -m tools.messages          print what has no Chinese yet, as lines to fill in
python -m tools.messages --sort   drop what the source no longer says, and put the rest in the order of the source
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from atomtune.language import FOLDER
from atomtune.sweep.trials import Status

SOURCE = FOLDER.parent
CATALOGUE = FOLDER / "zh.json"

#: Files with settings' classes, whose docstrings are headings in the help.
WITH_HEADINGS = (SOURCE / "settings" / "command_settings.py", SOURCE / "settings" / "run_settings.py")
#: Files whose texts stay English or have their own translation, and why.
NOT_SPOKEN = {
    "data/encoding/sandbox.py": "refusals of a template's code, in jinja's words",
    "data/formats/rendered_text.py": "texts that are recognised in records",
    "export/model_card.py": "a file that is published",
    "inspect/html_page.py": "a page that holds both languages",
    "catalogue.py": "what translates",
    "language.py": "what translates",
    "settings/help_json.py": "read by programs",
}

#: Two neighbouring words: a text that a person reads, not a name, a key or a pattern.
_WORDS = re.compile(r"[A-Za-z]{2,}[,;:.)\"'`]* [A-Za-z{(\"'`]|[A-Za-z] \{|[\d}][,;:)]* [A-Za-z]{2,}")
_NAMES_ONLY = re.compile(r"[a-z0-9_ ]*_[a-z0-9_ ]*")
#: A field of str.format in a plain text, for example `{:,} or more`.
_FIELD = re.compile(r"\{([a-z_]*)(:[^{}\"]*)?\}")
#: A message in a page template, up to its last bracket or to the call that fills it in.
_IN_A_PAGE = re.compile(r'\bt\("([^"]+)"[).]')
#: Functions of atomtune.language whose arguments are always messages, however short.
_GETS_MESSAGES = {"translated", "message"}
#: Texts that the source builds from single words, and the words for the status of a run or a trial.
_PUT_TOGETHER = [
    *(f"{{number}} {noun}{ending}" for noun in ("record", "token", "conversation", "group") for ending in ("", "s")),
    *(*get_args(Status), "preempted"),
]


def messages_of(file: Path) -> list[str]:
    """The texts of one file, in its order; values filled in at run time appear as names in braces."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    texts: dict[str, None] = {}
    if file in WITH_HEADINGS:
        texts |= dict.fromkeys(_headings(tree))
    for node, is_message in _strings(tree):
        text = template_of(node).strip()
        if is_message or (_WORDS.search(text) and not _NAMES_ONLY.fullmatch(text)):
            texts[text] = None
    return list(texts)


def _headings(tree: ast.Module) -> Iterator[str]:
    """The docstrings of the settings' classes, which are headings in the help."""
    for node in tree.body:
        heading = ast.get_docstring(node) if isinstance(node, ast.ClassDef) else None
        if heading and heading.isalpha():
            yield heading


def all_messages() -> dict[str, list[str]]:
    """File → its texts, for every file that has some."""
    files = {str(file.relative_to(SOURCE)): file for file in sorted(SOURCE.rglob("*.py"))}
    messages = {name: messages_of(file) for name, file in files.items() if name not in NOT_SPOKEN}
    pages = {str(file.relative_to(SOURCE)): messages_of_page(file) for file in sorted(SOURCE.rglob("*.html.jinja"))}
    return {**messages, **pages, "put together": _PUT_TOGETHER}


def messages_of_page(file: Path) -> list[str]:
    """The texts of a page template, `{{ t("Loss") }}`; `t` with two arguments has its Chinese there."""
    return [_of_format(text) for text in _IN_A_PAGE.findall(file.read_text(encoding="utf-8"))]


def template_of(node: ast.expr) -> str:
    """The text by which a translation is looked up: `f"{len(rows):,} rows"` → `{rows} rows`."""
    if isinstance(node, ast.Constant):
        return _of_format(node.value)
    assert isinstance(node, ast.JoinedStr)
    names: dict[str, str] = {}  # source of a value → its name
    text = ""
    for part in node.values:
        if isinstance(part, ast.Constant):
            text += _braces_doubled(part.value)
        else:
            assert isinstance(part, ast.FormattedValue)
            text += "{" + _name_of(part.value, names) + "}"
    return text


def _of_format(text: str) -> str:
    """A plain text in which each field of str.format has its name, or `value`."""
    template, end = "", 0
    for number, field in enumerate(_FIELD.finditer(text)):
        name = field[1] or f"value{number + 1 if number else ''}"
        template += _braces_doubled(text[end : field.start()]) + "{" + name + "}"
        end = field.end()
    return template + _braces_doubled(text[end:])


def _braces_doubled(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _name_of(value: ast.expr, names: dict[str, str]) -> str:
    """The name for a filled-in value: the first name in a call's argument, else in the whole expression."""
    source = ast.unparse(value)
    if source not in names:
        inner = _names_in(value.args[0]) if isinstance(value, ast.Call) and value.args else []
        stem = name = (inner or _names_in(value) or ["value"])[0]
        number = 1
        while name in names.values():
            number += 1
            name = f"{stem}{number}"
        names[source] = name
    return names[source]


def _names_in(node: ast.expr) -> list[str]:
    parts = [part for part in ast.walk(node) if isinstance(part, ast.Name | ast.Attribute)]
    return [part.id if isinstance(part, ast.Name) else part.attr for part in parts]


def _strings(node: ast.AST, *, is_message: bool = False) -> Iterator[tuple[ast.expr, bool]]:
    """Every string except docstrings, and whether it is passed to `translated`; an f-string first as a whole."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(child, ast.JoinedStr):
            yield child, is_message
            for part in child.values:
                if isinstance(part, ast.FormattedValue):
                    yield from _strings(ast.Expr(part.value))
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child, is_message
        elif isinstance(child, ast.Call):
            yield from _strings(child, is_message=_gets_messages(child))
        else:
            yield from _strings(child, is_message=is_message)


def _gets_messages(call: ast.Call) -> bool:
    """Whether the call is `translated(text)`, `message(text)` or `map(translated, texts)`."""
    functions = [call.func, *call.args[:1]]
    return any(isinstance(function, ast.Name) and function.id in _GETS_MESSAGES for function in functions)


def main() -> None:
    known = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    in_source = all_messages()
    if "--sort" in sys.argv:
        ordered = {text: known[text] for texts in in_source.values() for text in texts if text in known}
        CATALOGUE.write_text(json.dumps(ordered, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return
    for name, texts in in_source.items():
        for text in texts:
            if text not in known:
                print(f"{name}  {json.dumps(text, ensure_ascii=False)}: ,")


if __name__ == "__main__":
    main()
