"""The source of atomtune as data: its files, their first sentences, their functions and the sizes of these."""

import ast
import io
import tokenize
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
#: Tokens that are layout, not code.
LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)


class Source:
    """A source folder (src/atomtune), parsed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    @cached_property
    def texts(self) -> dict[str, str]:
        paths = sorted(self.folder.rglob("*.py"))
        return {path.relative_to(self.folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        return {file: ast.parse(text) for file, text in self.texts.items()}

    @cached_property
    def functions(self) -> dict[tuple[str, str], Function]:
        """Functions and methods by (file, name); inner functions belong to the function around them."""
        functions: dict[tuple[str, str], Function] = {}

        def collect(file: str, node: ast.AST, prefix: str) -> None:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.ClassDef):
                    collect(file, child, f"{prefix}{child.name}.")
                elif isinstance(child, Function):
                    functions[file, prefix + child.name] = child

        for file, tree in self.trees.items():
            collect(file, tree, "")
        return functions

    def lines(self, file: str) -> int:
        return len(self.texts[file].splitlines())

    def function_lines(self, file: str, name: str) -> int:
        node = self.functions.get((file, name))
        return node.end_lineno - node.lineno + 1 if node and node.end_lineno else 0

    def first_words(self, file: str) -> str:
        """The first sentence of the module's docstring, or its first paragraph if that is no sentence, on one line."""
        paragraph = (ast.get_docstring(self.trees[file]) or "").partition("\n\n")[0]
        words = " ".join(paragraph.split())
        sentence, dot, _ = words.partition(". ")
        return sentence + dot.strip()

    def code_lines(self, file: str) -> int:
        """Number of lines with code: without blank lines, comments and docstrings."""
        docstrings = set()
        for node in ast.walk(self.trees[file]):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.texts[file]).readline):
            if token.type not in LAYOUT:
                lines |= set(range(token.start[0], token.end[0] + 1))
        return len(lines - docstrings)

    def comments(self, file: str) -> int:
        tokens = tokenize.generate_tokens(io.StringIO(self.texts[file]).readline)
        return sum(token.type == tokenize.COMMENT for token in tokens)


def nodes(tree: ast.AST) -> int:
    """The number of syntax nodes: a measure of size that does not change if code is packed into fewer lines."""
    return sum(1 for _ in ast.walk(tree))
