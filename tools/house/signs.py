"""Signs of code to look at, not limits: dense, without comments, untyped, or with names that say nothing."""

import ast
import importlib.util
from collections import Counter
from functools import cache
from pathlib import Path

from tools.house.source import Source, nodes

#: Names that do not say what a value is; each value has a noun of the field.
DIALECT = ("one", "said", "asked", "given", "found", "made", "told", "kept", "drawn")
#: Libraries whose private names may break on upgrades.
LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate", "tokenizers")
#: Documented by Python in spite of their underscore.
PUBLIC = ("_replace", "_exit")
TOP = 12


def signs(source: Source) -> str:
    """All signs as text, the largest first."""
    parts = [
        ("functions with the most syntax nodes (the best trees of the field: some 300)", longest_functions(source)),
        ("syntax nodes a code line, by file (the best trees: 5 to 9)", densest_files(source)),
        ("bare Any parameters, by file", counted(any_parameters(source))),
        ("names of the dialect, by file", dialect(source)),
        ("private names of libraries", private_names(source)),
    ]
    lines = [totals(source)]
    for title, rows in parts:
        lines += ["", title, *(f"  {row}" for row in rows)]
    return "\n".join(lines)


def totals(source: Source) -> str:
    code_lines = sum(source.code_lines(file) for file in source.trees)
    all_nodes = sum(nodes(tree) for tree in source.trees.values())
    comments = sum(source.comments(file) for file in source.trees)
    words = sum(sum(words_of(tree).values()) for tree in source.trees.values())
    untyped = sum(any_parameters(source).values())
    return (
        f"{len(source.trees)} files, {code_lines:,} code lines, {all_nodes / code_lines:.1f} syntax nodes a code line, "
        f"{100 * comments / code_lines:.1f} comments per 100 code lines, {untyped} bare Any parameters, "
        f"{words} names of the dialect"
    )


def longest_functions(source: Source) -> list[str]:
    sizes = sorted(((nodes(node), file, name) for (file, name), node in source.functions.items()), reverse=True)
    return [f"{size:5}  {file} {name}" for size, file, name in sizes[:TOP]]


def densest_files(source: Source) -> list[str]:
    density = {file: nodes(tree) / source.code_lines(file) for file, tree in source.trees.items() if nodes(tree) > 300}
    densest = sorted(density.items(), key=lambda pair: -pair[1])
    return [f"{value:5.1f}  {file}" for file, value in densest[:TOP]]


def any_parameters(source: Source) -> Counter[str]:
    """Parameters typed only as Any, by file; *args and **kwargs are not counted, because a library decides them."""
    count: Counter[str] = Counter()
    for (file, _), function in source.functions.items():
        parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        count[file] += sum(isinstance(p.annotation, ast.Name) and p.annotation.id == "Any" for p in parameters)
    return count


def words_of(tree: ast.AST) -> Counter[str]:
    """Uses of the words in DIALECT as names of variables, parameters, keywords and attributes."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.append(node.id)
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            names.append(node.arg)
        elif isinstance(node, ast.Attribute):
            names.append(node.attr)
    return Counter(name for name in names if name in DIALECT)


def dialect(source: Source) -> list[str]:
    by_file = {file: words_of(tree) for file, tree in source.trees.items()}
    most = sorted(by_file.items(), key=lambda pair: -sum(pair[1].values()))[:TOP]
    return [
        f"{sum(words.values()):5}  {file}  " + ", ".join(f"{word} {n}" for word, n in words.most_common())
        for file, words in most
        if words
    ]


def private_names(source: Source) -> list[str]:
    """By file: private names (one underscore) of libraries that are used or overridden."""
    private = {file: private_names_of(tree) for file, tree in source.trees.items()}
    return [f"{file}  {', '.join(sorted(names))}" for file, names in private.items() if names]


def private_names_of(tree: ast.AST) -> set[str]:
    """Private names of libraries in a file.

    Found are `from torch.x import _y`, `torch._y`, `config._y`, a method set on another object, and the private methods
    of transformers' Trainer that a subclass overrides or calls.
    """
    names: set[str] = set()
    defined = names_defined_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            names |= {f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name)}
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in PUBLIC:
            owner: ast.expr = node.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            # Attributes of self, of our classes and of names defined in this file are ours; all others are a library's.
            if (
                node.attr not in defined
                and isinstance(owner, ast.Name)
                and owner.id not in ("self", "cls")
                and owner.id[0].islower()
            ):
                names.add(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("MethodType"):
            names.add(ast.unparse(node.func))
        elif isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Trainer") for base in node.bases):
            overridden = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            called = {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
            private = {method for method in overridden | called if is_private(method)}
            names |= {f"Trainer.{method}" for method in private & trainer_methods()}
    return names


def names_defined_in(tree: ast.AST) -> set[str]:
    """Functions, methods and annotated fields of a file."""
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    fields = (node.target for node in ast.walk(tree) if isinstance(node, ast.AnnAssign))
    return functions | {target.id for target in fields if isinstance(target, ast.Name)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def trainer_methods() -> set[str]:
    """The methods of transformers' Trainer, read from its source, because importing it would load torch."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations
    text = Path(spec.submodule_search_locations[0], "trainer.py").read_text(encoding="utf-8")
    return {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}


def counted(counts: Counter[str]) -> list[str]:
    return [f"{number:5}  {file}" for file, number in counts.most_common(TOP) if number]
