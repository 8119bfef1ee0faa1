"""Markdown: texts for a box that renders Markdown, where nothing in them may become a tag or a picture."""

import re
from collections.abc import Callable

#: Code, as CommonMark has it: a fence up to one of its own kind, or to the end of the text; or a text in one line
#: between two runs of as many backticks. An escaped backtick begins none.
_CODE = re.compile(
    r"\\[\\`]"
    r"|(?P<code>^[ \t]*(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})[^\n]*(?:\n.*?^[ \t]*(?P=fence)[`~]*[ \t]*$|.*)"
    r"|(?<!`)(?P<ticks>`+)(?!`)[^\n]+?(?<!`)(?P=ticks)(?!`))",
    re.DOTALL | re.MULTILINE,
)


def as_markdown(text: str) -> str:
    """A text for a box that renders Markdown; outside of code, what looks like a tag or a picture is escaped."""
    return _outside_code(text, lambda part: part.replace("&", "&amp;").replace("<", "&lt;").replace("![", "&#33;["))


def from_markdown(text: str) -> str:
    """The inverse of `as_markdown`, for a question that was edited on the page."""
    return _outside_code(text, lambda part: part.replace("&#33;[", "![").replace("&lt;", "<").replace("&amp;", "&"))


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    changed, end = "", 0
    for code in _CODE.finditer(text):
        if code["code"]:
            changed += change(text[end : code.start()]) + code["code"]
            end = code.end()
    return changed + change(text[end:])


def as_code(text: str) -> str:
    """A text as inline code in Markdown, between more backticks than it has in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    ticks, space = "`" * (longest + 1), " " if longest else ""
    return f"{ticks}{space}{' '.join(text.split())}{space}{ticks}"
