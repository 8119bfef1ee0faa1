"""The map in CONTRIBUTING.md: the tree of files with the first sentence of each, and the four walks."""

import re
import textwrap
from pathlib import PurePosixPath

from tools.house.source import Source
from tools.house.walks import Walk, room_of

BEGIN, END = "<!-- computed by `make house` -->", "<!-- end of what is computed -->"
#: The page's title for each walk.
TITLES = {
    "record": "One record, from its line to the optimizer's step",
    "setting": "One setting, `--lora_rank`, from the flag to its use",
    "bad line": "A bad line, from where it is read to the message",
    "resume": "`--resume`, outside data, batch and model",
}


def tree(source: Source) -> str:
    """One line per file: its name and the first sentence of its docstring."""
    lines = ["src/atomtune/"]
    for file in sorted(source.texts, key=tree_order):
        path = PurePosixPath(file)
        depth = len(path.parts)
        if path.name == "__init__.py":
            if depth == 1:
                continue
            lines.append(tree_line(depth - 1, f"{path.parts[-2]}/", source.first_words(file)))
        else:
            lines.append(tree_line(depth, path.name, source.first_words(file)))
    return "\n".join(lines)


def tree_order(file: str) -> list[tuple[bool, str]]:
    """Sort key: in each folder its own docstring first, then its files, then its subfolders."""
    *folders, name = PurePosixPath(file).parts
    if name == "__init__.py":
        name = ""
    return [*((True, folder) for folder in folders), (False, name)]


def tree_line(depth: int, name: str, words: str) -> str:
    return f"{'  ' * depth}{name}".ljust(30) + f" {words}"


def walks_text(walks: dict[str, Walk]) -> str:
    """The files of each walk in order; for the record's walk the functions too.

    Without figures, which change with every edit. `make house` prints them.
    """
    rooms = " → ".join(walks["record"].rooms)
    parts = [textwrap.fill(f"Rooms in the order entered: {rooms}.", 118)]
    for name, walk in walks.items():
        parts.append(f"### {TITLES[name]}\n\n```\n{steps(walk, functions=name == 'record')}\n```")
    return "\n\n".join(parts)


def figures(walk: Walk) -> str:
    return (
        f"{len(walk.files)} files of {walk.file_lines():,} lines, "
        f"{len(walk.functions)} functions of {walk.function_lines():,} lines; "
        f"{walk.returns()} returns to a file left before, {walk.returns(room_of)} to a room."
    )


def steps(walk: Walk, *, functions: bool) -> str:
    if not functions:
        return textwrap.fill(" → ".join(walk.files), 118, break_long_words=False, break_on_hyphens=False)
    lines = []
    for file, names in walk.files.items():
        text = textwrap.wrap(", ".join(names), 82, break_long_words=False)
        lines += [f"{file if number == 0 else '':<35}{line}" for number, line in enumerate(text)]
    return "\n".join(lines)


def computed(source: Source, walks: dict[str, Walk]) -> str:
    return f"```\n{tree(source)}\n```\n\n{walks_text(walks)}"


def with_map(page: str, text: str) -> str:
    """The page with its computed part replaced."""
    assert page.count(BEGIN) == page.count(END) == 1, "CONTRIBUTING.md has lost the marks around its computed map"
    return re.sub(
        f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n\n{text}\n\n{END}", page, flags=re.DOTALL
    )


def stated(page: str) -> tuple[str, str]:
    """The tree and the walks as the page has them."""
    text = page.partition(BEGIN)[2].partition(END)[0]
    _, tree_text, walks_part = text.split("```", 2)
    return tree_text.strip(), walks_part.strip()
